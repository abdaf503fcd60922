from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import private_server, servers
from tests.databases import Unavailable, query, settings_for, version_text
from tests.machine import directories, first, free_port, reported_version, temp_root
from tests.servers import SERVERS, PostgreSQL, Server

once = pytest.mark.vendor("sqlite")  # nothing about these depends on the database under test
each = pytest.mark.parametrize(
    "kind",
    [
        pytest.param(SERVERS["postgresql"], marks=pytest.mark.vendor("postgresql")),
        pytest.param(SERVERS["mariadb"], marks=pytest.mark.vendor("mysql")),
    ],
)


@pytest.fixture
def server(kind: type[Server]) -> Iterator[Server]:
    try:
        made = kind()
    except Unavailable as reason:  # the database under test is then one that somebody named
        pytest.skip(str(reason))
    with made:
        yield made


def program(folder: Path, name: str, says: str = "") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return path


@once
def test_a_version_is_read_from_what_the_binary_prints(tmp_path: Path) -> None:
    assert reported_version(program(tmp_path, "x", "postgres (PostgreSQL) 16.4")) == (16, 4)
    assert reported_version(program(tmp_path, "x", "postgres (PostgreSQL) 18beta1")) == (18,)
    assert reported_version(tmp_path / "absent") == ()


@once
def test_the_newest_whole_installation_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, number in {"a": "9.6", "b": "15.2", "c": "16.1", "d": "17.0"}.items():
        for name in ("initdb", "pg_ctl", "postgres"):
            program(tmp_path / folder, name, f"{name} (PostgreSQL) {number}")
    (tmp_path / "d" / "initdb").unlink()  # a lone server, as a wrapper in PATH may be one
    places = [tmp_path / folder for folder in "abcd"]
    monkeypatch.setattr(servers, "directories", lambda *_: places)
    assert PostgreSQL().bin == tmp_path / "c"


@once
@pytest.mark.parametrize("kind", SERVERS.values())
def test_without_binaries_the_reason_says_where_we_looked(
    kind: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "directories", lambda *_: [tmp_path])
    with pytest.raises(Unavailable, match=rf"no .* found \(looked in {tmp_path}\)"):
        kind()


@once
def test_usual_places_come_before_path_and_names_before_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, path = tmp_path / "usual-1", tmp_path / "path"
    program(usual, "mysqld")
    program(path, "mariadbd")
    monkeypatch.setenv("PATH", str(path))
    places = directories(str(tmp_path / "usual-*"))
    assert places == [usual, path]
    assert first(places, "mariadbd", "mysqld") == path / "mariadbd"
    assert first(places, "absent") is None


@once
def test_a_private_temp_folder_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert temp_root() in {"/tmp", "/var/tmp"}


@once
def test_a_url_becomes_settings() -> None:
    at = settings_for("mariadb://me:p%40ss@127.0.0.1:3307/shop")
    assert (at["ENGINE"], at["NAME"]) == ("django.db.backends.mysql", "shop")
    assert (at["HOST"], at["PORT"], at["USER"], at["PASSWORD"]) == ("127.0.0.1", 3307, "me", "p@ss")
    assert settings_for("sqlite:////tmp/x")["NAME"] == "/tmp/x"
    with pytest.raises(ValueError, match=r"starts with one of .*, not with 'oracle'"):
        settings_for("oracle://x/y")


@once
def test_a_servers_words_about_its_version_are_shortened() -> None:
    assert version_text("PostgreSQL 15.14 (Debian 15.14-0) on x86_64") == "PostgreSQL 15.14"
    assert version_text("10.11.14-MariaDB-0+deb12u2") == "MariaDB 10.11.14"
    assert version_text("8.0.39") == "MySQL 8.0.39"


@each
def test_it_serves_far_from_utc_and_not_as_root(server: Server) -> None:
    zone = {"postgresql": "SHOW timezone", "mariadb": "SELECT @@time_zone"}[server.scheme]
    assert query(server.url, zone) in {("Asia/Seoul",), ("+09:00",)}
    assert server.home is not None
    assert server.home.stat().st_uid != 0
    if Path("/proc").is_dir():
        assert Path(f"/proc/{server.pid}").stat().st_uid != 0


@each
def test_after_a_crash_it_starts_again_with_its_data_on_its_port(server: Server) -> None:
    query(server.url, "CREATE TABLE kept (id int)")
    port, pid = server.port, server.pid
    server.kill()
    server.start()
    server.restart()
    assert server.port == port
    assert server.pid != pid
    assert query(server.url, "SELECT count(*) FROM kept") == (0,)


@each
def test_stop_leaves_nothing_and_may_be_called_twice(server: Server) -> None:
    pid, home = server.pid, server.home
    assert home is not None
    server.stop()
    server.stop()
    assert not home.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@each
def test_the_answer_of_another_server_is_not_taken_for_ours(
    kind: type[Server], server: Server, tmp_path: Path
) -> None:
    other = kind()
    other.home, other.process = tmp_path, server.process
    other.port, other.password = free_port(), server.password
    assert other.is_ours() is None  # nobody answers
    other.port = server.port
    assert other.is_ours() is False
    assert server.is_ours() is True


@each
def test_a_port_lost_to_somebody_else_is_replaced(
    kind: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        free = free_port()
        ports = iter([taken.getsockname()[1], free])
        monkeypatch.setattr(private_server, "free_port", lambda: next(ports))
        with kind() as server:
            assert server.port == free


@each
def test_a_server_that_cannot_start_says_why(
    kind: type[Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = kind()
    monkeypatch.setattr(private_server, "START_LIMIT", 0.5)
    monkeypatch.setattr(server, "create_data", lambda: server.data.mkdir())
    with pytest.raises(Unavailable, match=r"does not start: .+"):
        server.start()
    assert server.home is None
    assert server.process is None


@each
@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a child when its parent ends")
def test_it_ends_when_the_process_that_started_it_is_killed(kind: type[Server]) -> None:
    code = (
        f"from tests.servers import {kind.__name__} as Kind; import time\n"
        "server = Kind(); server.start(); print(server.pid, server.home, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid, home = parent.stdout.readline().split()
        parent.kill()
    try:
        assert gone_within(20, int(pid))
    finally:
        subprocess.run(["rm", "-rf", home], check=True)


def gone_within(seconds: float, pid: int) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, signal.SIG_DFL)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
