"""A private PgBouncer in transaction mode, in front of a private PostgreSQL.

Each transaction may run in another server session, so nothing outlives it: no SET, no prepared
statement, no backend pid.
"""

from __future__ import annotations

import signal
from pathlib import Path

from tests.databases import Unavailable, rows
from tests.machine import directories, first, shown
from tests.private_server import USER, Server
from tests.servers import PostgreSQL

CONFIG = """\
[databases]
* = host=127.0.0.1 port={server}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
admin_users = {user}
pidfile = {folder}/pid
pool_mode = transaction
default_pool_size = 50
max_client_conn = 500
"""


class PgBouncer(Server):
    """A pooler and the server behind it, which live and die together."""

    scheme = "pgbouncer"
    users = ("postgres",)
    stop_signal = signal.SIGTERM  # at once, whatever clients do
    maintenance = "postgres"
    directory_query = ""
    databases = ()  # the server behind has made them

    def find_binaries(self) -> None:
        places = directories("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/bin")
        found = first(places, "pgbouncer")
        if found is None:
            raise Unavailable(f"no pgbouncer found (looked in {shown(places)})")
        self.binary = found
        self.behind = PostgreSQL(durable=self.durable)

    @property
    def pid_file(self) -> Path:
        return self.data / "pid"

    def start(self) -> None:
        try:
            if self.behind.process is None:
                self.behind.password = self.password
                self.behind.start()
            super().start()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self.behind.stop()

    def create_data(self) -> None:
        self._prepare("mkdir", self.data)  # as the user who writes the pid there
        (self.data / "users").write_text(f'"{USER}" "{self.password}"\n')

    def command(self) -> list[str]:
        config = self.data / "config"
        config.write_text(
            CONFIG.format(server=self.behind.port, port=self.port, folder=self.data, user=USER)
        )
        return [str(self.binary), str(config)]

    def is_ours(self) -> bool | None:
        """Whether it answers with our configuration, and has written our child's pid."""
        try:
            config = {row[0]: row[1] for row in rows(self.url, "SHOW CONFIG", name="pgbouncer")}
            if Path(config["pidfile"]) != self.pid_file:
                return False
            return self.pid_file.read_text().strip() == str(self.pid) or None
        except Unavailable:
            raise
        except Exception:  # the driver's own, or a file that is not written yet
            return None
