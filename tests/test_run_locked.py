"""`manage.py run_locked` as cron would run it: real processes, real signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection

from distlock import lock, receipts
from distlock.management.children import Bell, Child
from distlock.models import Job
from tests.commands import MANAGE, ROOT, done, ended, environ, is_alive, kill, manage
from tests.support import (
    becomes_free,
    eventually,
    in_thread,
    is_free,
    other_session,
    row,
    sessions,
    steal,
)

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])
once_is_enough = pytest.mark.vendor("postgresql")

IGNORABLE = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT)


@pytest.fixture(autouse=True)
def no_signal_is_ignored() -> Iterator[None]:
    """A suite that runs under nohup or in the background hands down that it ignores some."""
    ignored = [number for number in IGNORABLE if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


"""For what is about processes and not about the database."""

TOUCHY = """
import signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
    signal.signal(number, lambda number, frame: sys.exit(number))
print("ready", flush=True)
while True:  # a signal just before a sleep is handled after it
    time.sleep(0.05)
"""
DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""
touchy = ("--", sys.executable, "-c", TOUCHY)
deaf = ("--", sys.executable, "-c", DEAF)
SHORT = "1.5"


def ready(process: subprocess.Popen[str]) -> str:
    """Wait for the first line of the command."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line, process.stderr and process.stderr.read()
    return line


# -- the exit status -----------------------------------------------------------------------------


def test_the_status_is_the_commands_own() -> None:
    commands = {
        "good": ("sh -c true", 0),
        "bad": ("sh -c exit${IFS}3", 3),
        "killed": ("sh -c kill${IFS}-9${IFS}$$", 137),
        "missing": ("no-such-command", 127),
        "no program": (str(ROOT / "README.md"), 126),
    }
    with ExitStack() as stack:
        for name, (command, expected) in commands.items():
            process = stack.enter_context(manage("run_locked", name, "--", *command.split()))
            commands[name] = (process, expected)  # type: ignore[assignment]
        for name, (process, expected) in commands.items():
            status, out, err = ended(process)  # type: ignore[arg-type]
            assert (name, status, out) == (name, expected, "")
            assert ("No such file" in err, "Permission denied" in err) == (
                name == "missing",
                name == "no program",
            )
            assert is_free(name)


def test_a_busy_lock_has_a_status_of_its_own_and_the_command_does_not_run() -> None:
    with lock("job", note="the other host"), ExitStack() as stack:
        command = ("--", "echo", "ran")
        plain, mild, silent = (
            stack.enter_context(manage("run_locked", "job", *options, *command))
            for options in ((), ("--busy-status", "0"), ("--busy-status=9", "-v0"))
        )
        assert ended(silent) == (9, "", "")
        for process, expected in ((plain, 75), (mild, 0)):
            status, out, err = ended(process)
            assert (status, out) == (expected, "")
            assert "'job' was not free" in err
            assert "the other host" in err


def test_it_waits_if_told_to() -> None:
    lease = lock("job", ttl=60).acquire()
    with manage("run_locked", "job", "--wait", "forever", "--", "echo", "ran") as process:
        time.sleep(1.2)
        assert process.poll() is None
        lease.release()
        assert ended(process) == (0, "ran\n", "")


def test_min_hold_keeps_it_from_the_next_host() -> None:
    assert done("run_locked", "job", "--min-hold", "1m", "--", "true")[0] == 0
    assert done("run_locked", "job", "--", "true")[0] == 75


# -- while it runs -------------------------------------------------------------------------------


def test_the_lock_is_held_while_the_command_runs_and_the_process_sleeps() -> None:
    with manage("run_locked", "job", "--note", "nightly", "--ttl", SHORT, *touchy) as process:
        ready(process)
        holder = lock("job").holder()
        assert holder is not None
        assert (holder.pid, holder.note) == (process.pid, "nightly")
        before = wakings(process.pid)
        time.sleep(1.3 * float(SHORT))
        assert wakings(process.pid) - before <= 1
        assert not is_free("job")
        process.terminate()
        assert ended(process)[0] == signal.SIGTERM
    assert is_free("job")


def wakings(pid: int) -> int:
    """How often the main thread has gone to sleep."""
    status = Path(f"/proc/{pid}/task/{pid}/status").read_text()
    return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])


@pytest.mark.vendor("postgresql", "mysql")
def test_the_server_has_one_session_of_it_and_no_transaction() -> None:
    before = sessions()
    with manage("run_locked", "job", "--ttl", SHORT, *touchy) as process:
        ready(process)
        time.sleep(float(SHORT) / 2)  # it has been renewed
        assert len(sessions() - before) == 1
        assert open_transactions() == 0
        process.terminate()
        ended(process)


def open_transactions() -> int:
    with other_session() as cursor:
        if connection.vendor == "postgresql":
            cursor.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                "AND xact_start IS NOT NULL AND pid <> pg_backend_pid()"
            )
        else:
            cursor.execute("SELECT count(*) FROM information_schema.innodb_trx")
        return int(cursor.fetchone()[0])


@once_is_enough
def test_the_streams_are_the_commands() -> None:
    script = "cat; echo said >&2; ls /proc/self/fd"
    with manage("run_locked", "job", "--", "sh", "-c", script) as process:
        out, err = process.communicate("given", timeout=30)
    assert (process.returncode, err) == (0, "said\n")
    assert out == "given0\n1\n2\n3\n"  # 3 is the folder that ls reads


@once_is_enough
def test_the_command_gets_the_token() -> None:
    said = done("run_locked", "job", "--", "printenv", "DISTLOCK_TOKEN")[1]
    assert int(said) == row("job")["fencing_token"]


@once_is_enough
def test_what_follows_the_dashes_is_the_commands() -> None:
    given = ["--ttl", "3", "--", "-v0", "--help"]
    assert done("run_locked", "job", "--", "echo", *given)[1].split() == given


# -- signals -------------------------------------------------------------------------------------


@once_is_enough
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_a_signal_is_passed_on(name: str) -> None:
    number = signal.Signals[name]
    with manage("run_locked", "job", *touchy) as process:
        ready(process)
        process.send_signal(number)
        assert ended(process) == (number, "", "")
    assert is_free("job")


@once_is_enough
def test_a_signal_reaches_what_the_command_has_started() -> None:
    with manage("run_locked", "job", "--", "sh", "-c", "sleep 60 & echo $!; wait") as process:
        grandchild = int(ready(process))
        process.terminate()
        assert ended(process)[0] == 128 + signal.SIGTERM
    assert eventually(lambda: not is_alive(grandchild))


@once_is_enough
def test_signals_that_a_parent_has_blocked_are_heard() -> None:
    def block() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM})

    assert done("run_locked", "job", "--", "true", prepare=block)[0] == 0
    with manage("run_locked", "job", *touchy, prepare=block) as process:
        ready(process)
        process.terminate()
        assert ended(process)[0] == signal.SIGTERM


@once_is_enough
def test_a_signal_after_the_command_ends_the_process() -> None:
    """What comes then, such as a release that has no answer, is not the child's."""
    before = signal.getsignal(signal.SIGUSR1)
    with Bell() as bell:
        assert Child(["true"], on_lost=None, kill_after=1).run(bell, 1) == 0
        with pytest.raises(SystemExit) as caught:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5)
    assert caught.value.code == 128 + signal.SIGUSR1
    assert signal.getsignal(signal.SIGUSR1) == before


@once_is_enough
def test_control_c_in_a_terminal_comes_once() -> None:
    counting = (
        "import signal, time; told = []\n"
        "signal.signal(signal.SIGINT, lambda *given: told.append(1))\n"
        "print('ready', flush=True)\n"
        "while not told: time.sleep(0.05)\n"
        "time.sleep(0.3); print('told', len(told), flush=True)"
    )
    command = [*MANAGE, "run_locked", "job", "--", sys.executable, "-c", counting]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(command[0], command, environ())
    try:
        said = read_until(terminal, b"ready")
        os.write(terminal, b"\x03")
        said = read_until(terminal, b"told 1")
        assert b"Traceback" not in said
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        kill(pid)
        os.close(terminal)


@once_is_enough
def test_control_z_does_not_stop_the_renewals() -> None:
    def prepare() -> None:
        os.setpgid(0, 0)  # in a group without a parent nothing is stopped anyway

    with manage("run_locked", "job", *touchy, prepare=prepare) as process:
        ready(process)
        process.send_signal(signal.SIGTSTP)
        time.sleep(0.2)
        assert Path(f"/proc/{process.pid}/stat").read_text().split(") ")[1][0] != "T"
        process.terminate()
        assert ended(process)[0] == signal.SIGTERM


def read_until(terminal: int, words: bytes) -> bytes:
    said = b""
    deadline = time.monotonic() + 20
    while words not in said:
        assert time.monotonic() < deadline, said
        said += os.read(terminal, 4096)
    return said


@once_is_enough
def test_a_signal_while_it_waits_ends_it_and_leaves_nothing() -> None:
    with lock("job", ttl=60):
        before = sessions()
        with manage("run_locked", "job", "--wait", "forever", "--", "echo", "ran") as process:
            assert eventually(lambda: len(sessions() - before) == 2)  # one of them listens
            process.terminate()
            assert ended(process) == (128 + signal.SIGTERM, "", "")
    assert is_free("job")


@once_is_enough
def test_ignored_signals_stay_ignored_but_for_that_of_a_childs_end() -> None:
    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)

    script = "echo ready; sleep 0.5; exit 3"
    with manage("run_locked", "job", "--", "sh", "-c", script, prepare=prepare) as process:
        ready(process)
        process.send_signal(signal.SIGHUP)
        assert ended(process) == (3, "", "")


def test_a_kill_leaves_the_lease_to_its_ttl() -> None:
    with manage("run_locked", "job", "--ttl", SHORT, "--", "sh", "-c", "echo $$; exec sleep 9") as (
        process
    ):
        child = int(ready(process))
        process.kill()
        process.wait()
        assert is_alive(child)  # as docs/commands.md says
        assert becomes_free("job", float(SHORT) + 2)
        kill(child)


# -- the lock is lost ----------------------------------------------------------------------------


def test_a_loss_ends_the_command() -> None:
    with manage("run_locked", "job", "--ttl", SHORT, *touchy) as process:
        ready(process)
        steal("job")
        lost = time.monotonic()
        status, _, err = ended(process)
        assert time.monotonic() - lost < float(SHORT) + 1
    assert status == 69
    assert "lost" in err
    assert not is_free("job")  # it is the other one's


@once_is_enough
@pytest.mark.parametrize("how", [("--kill-after", "0.2"), ("--on-lost", "kill")])
def test_a_command_that_does_not_listen_is_killed(how: tuple[str, ...]) -> None:
    with manage("run_locked", "job", "--ttl", SHORT, *how, *deaf) as process:
        ready(process)
        steal("job")
        lost = time.monotonic()
        assert ended(process)[0] == 69
        assert time.monotonic() - lost < float(SHORT) + 2


@once_is_enough
def test_what_the_command_has_started_is_ended_too_and_may_take_its_time(tmp_path: Path) -> None:
    (tmp_path / "tidy").write_text(
        "trap 'sleep 0.4; echo tidy; exit' TERM; echo $$; sleep 60 & wait"
    )
    (tmp_path / "deaf").write_text("trap '' TERM; echo $$; sleep 60")
    (tmp_path / "both").write_text("sh tidy & sh deaf & wait")
    how = ("--ttl", SHORT, "--kill-after", "1.5")
    with manage("run_locked", "job", *how, "--", "sh", "-c", f"cd {tmp_path}; . ./both") as process:
        pids = [int(ready(process)), int(ready(process))]
        steal("job")
        status, out, _ = ended(process)
        assert (status, out) == (69, "tidy\n")
        assert eventually(lambda: not any(map(is_alive, pids)))


@once_is_enough
def test_a_loss_that_is_to_be_ignored_is_told_at_the_end() -> None:
    script = "echo ready; sleep 1.5; echo done"
    how = ("--ttl", SHORT, "--on-lost", "ignore")
    with manage("run_locked", "job", *how, "--", "sh", "-c", script) as process:
        ready(process)
        steal("job")
        status, out, err = ended(process)
    assert (status, out) == (69, "done\n")
    assert "lost" in err


# -- once per period -----------------------------------------------------------------------------


def test_once_every_is_one_success_over_all_hosts(tmp_path: Path) -> None:
    script = f"echo ran >> {tmp_path}/log; test -e {tmp_path}/good"
    command = ("run_locked", "job", "--once-every", "3000d", "--", "sh", "-c", script)

    def runs() -> int:
        return len((tmp_path / "log").read_text().splitlines())

    assert done(*command)[0] == 1  # no receipt: the next host may try
    assert runs() == 1
    (tmp_path / "good").touch()
    with ExitStack() as stack:
        hosts = [stack.enter_context(manage(*command, "-v0")) for _ in range(3)]
        statuses = [ended(host)[0] for host in hosts]
    assert set(statuses) <= {0, 75}
    assert runs() == 2
    status, _, said = done(*command)
    assert (status, runs()) == (0, 2)
    assert "was done before" in said
    assert Job.objects.get(key__startswith="job@").task.endswith("run_locked.Command.succeed")


@once_is_enough
def test_a_loss_leaves_no_receipt() -> None:
    with manage("run_locked", "job", "--once-every=3000d", "--ttl", SHORT, *touchy) as process:
        ready(process)
        steal("job")
        assert ended(process)[0] == 69
    assert not Job.objects.filter(state=Job.State.DONE).exists()


@once_is_enough
def test_a_success_that_cannot_be_noted_is_not_called_untried(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*args: Any, **kwargs: Any) -> None:
        raise OperationalError("gone away")

    monkeypatch.setattr(receipts, "finish", gone)
    with pytest.raises(SystemExit, match="125"):
        call_command("run_locked", "job", "--once-every=3000d", "--", "echo", "ran")
    out, err = capfd.readouterr()
    assert out == "ran\n"
    assert "has run, but that could not be noted: gone away" in err


# -- bad input -----------------------------------------------------------------------------------


@once_is_enough
@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--ttl=0"], "--ttl must be greater than 0"),
        (["--ttl=1w"], "--ttl must be a time like .*'1w'"),
        (["--wait=-1"], "--wait must be a time like"),
        (["--wait=1e3"], "--wait must be a time like"),
        (["--min-hold=x"], "--min-hold must"),
        (["--once-every=0.5"], "every must be at least a second"),
        (["--once-every=hourly"], "--once-every must be a time like"),
        (["--kill-after=x"], "--kill-after must"),
        (["--busy-status=256"], "--busy-status must be a number from 0 to 255"),
        (["--database=nowhere"], "'nowhere' is not in DATABASES"),
        (["--note=" + 256 * "x"], "note must have at most 255"),
        (["--on-lost=wait"], "invalid choice"),
    ],
)
def test_bad_input_is_an_error_that_names_it(options: list[str], named: str) -> None:
    with pytest.raises(CommandError, match=named):
        call_command("run_locked", "job", *options, "--", "false")
    assert lock("job").holder() is None


@once_is_enough
def test_from_python_it_ends_with_an_exit_too(capfd: pytest.CaptureFixture[str]) -> None:
    call_command("run_locked", "job", "--", "echo", "ran")
    with pytest.raises(SystemExit, match="3"):
        call_command("run_locked", "job", "--", "sh", "-c", "exit 3", ttl=20)
    assert capfd.readouterr() == ("ran\n", "")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    with pytest.raises(CommandError, match="main thread"):
        in_thread(lambda: call_command("run_locked", "job", "--", "true"))


@once_is_enough
def test_a_database_that_cannot_be_asked_has_a_status_too() -> None:
    env = {**environ(), "DISTLOCK_WORKER_DATABASE_default": "nowhere"}
    status, out, err = done("run_locked", "job", "--", "echo", "ran", env=env)
    assert (status, out) == (125, "")
    assert "nowhere" in err
