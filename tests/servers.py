"""Private, throw-away database servers, started from the binaries that are installed.

    with PostgreSQL() as server:
        server.url      # postgresql://distlock:...@127.0.0.1:40213/distlock

A server lives in a temp folder of its own, listens on a free port of 127.0.0.1 behind a random
password, and is a child of this process. A server that the machine runs anyway is never touched:
see private_server.py.

The servers stand in Seoul, far from UTC and from the zone of the test settings: code that mixes up
two zones shows it at once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.databases import Unavailable
from tests.machine import directories, first, reported_version, shown
from tests.private_server import DATABASES, USER, Server

__all__ = ["DATABASES", "SERVERS", "MariaDB", "PostgreSQL", "Server"]


class PostgreSQL(Server):
    scheme = "postgresql"
    users = ("postgres",)
    stop_signal = signal.SIGINT  # fast shutdown: do not wait for clients
    maintenance = "postgres"
    directory_query = "SELECT current_setting('data_directory')"

    def find_binaries(self) -> None:
        places = directories(
            "/usr/lib/postgresql/*/bin",
            "/usr/pgsql-*/bin",
            "/usr/local/pgsql/bin",
            "/opt/homebrew/opt/postgresql*/bin",
            "/usr/local/opt/postgresql*/bin",
        )
        # All from one directory: PATH may lead to wrappers or to a mixture of versions.
        needed = ("initdb", "pg_ctl", "postgres")
        whole = [d for d in places if all(os.access(d / name, os.X_OK) for name in needed)]
        if not whole:
            raise Unavailable(f"no initdb and postgres found (looked in {shown(places)})")
        self.bin = max(whole, key=lambda d: reported_version(d / "postgres"))

    @property
    def pid_file(self) -> Path:
        return self.data / "postmaster.pid"

    def create_data(self) -> None:
        password = self.data.parent / "password"
        password.write_text(self.password)
        password.chmod(0o644)  # the folder around it is private
        login = ("-U", USER, "-A", "scram-sha-256", f"--pwfile={password}")
        self._prepare(
            self.bin / "initdb", "-D", self.data, *login, "-E", "UTF8", "--locale=C", "--no-sync"
        )

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "timezone": "Asia/Seoul",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [str(self.bin / "postgres"), "-D", str(self.data), *options]


class MariaDB(Server):
    """MariaDB, or MySQL where only that is installed."""

    scheme = "mariadb"
    users = ("mysql",)
    stop_signal = signal.SIGTERM
    maintenance = ""
    directory_query = "SELECT @@datadir"

    def find_binaries(self) -> None:
        places = directories(
            "/usr/sbin",
            "/usr/local/sbin",
            "/usr/libexec",
            "/usr/local/m*/bin",
            "/opt/homebrew/opt/m*/bin",
            "/usr/local/opt/m*/bin",
        )
        server = first(places, "mariadbd", "mysqld")
        if server is None:
            raise Unavailable(f"no mariadbd or mysqld found (looked in {shown(places)})")
        near = [server.parent, server.parent.parent / "bin", server.parent.parent / "scripts"]
        self.server = server
        self.installer = first([*near, *places], "mariadb-install-db", "mysql_install_db")

    @property
    def pid_file(self) -> Path:
        return self.data / "pid"

    def create_data(self) -> None:
        where = ("--no-defaults", f"--datadir={self.data}")
        if self.installer is None:
            self._prepare(self.server, *where, "--initialize-insecure")
        else:
            root = "--auth-root-authentication-method=normal"
            self._prepare(self.installer, *where, "--skip-test-db", root)
        (self.data.parent / "init.sql").write_text(
            "DROP USER IF EXISTS root@'127.0.0.1', root@'::1', ''@localhost;\n"
            f"CREATE USER IF NOT EXISTS {USER}@'127.0.0.1' IDENTIFIED BY '{self.password}';\n"
            f"GRANT ALL ON *.* TO {USER}@'127.0.0.1' WITH GRANT OPTION;\n"
        )

    def command(self) -> list[str]:
        options = {
            "datadir": self.data,
            "pid-file": self.pid_file,
            "init-file": self.data.parent / "init.sql",
            "socket": self.data.parent / "s",
            "bind-address": "127.0.0.1",
            "port": self.port,
            "max-connections": 200,
            "default-time-zone": "+09:00",
            "character-set-server": "utf8mb4",
            "loose-mysqlx": "OFF",
        }
        if not self.durable:
            options |= {"innodb-flush-log-at-trx-commit": 0, "sync-binlog": 0}
        flags = [f"--{name}={value}" for name, value in options.items()]
        return [str(self.server), "--no-defaults", "--skip-name-resolve", *flags]


SERVERS: dict[str, type[Server]] = {"postgresql": PostgreSQL, "mariadb": MariaDB}
