"""A private RabbitMQ node for the workers: it answers by its own name, or it is not ours."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import amqp

from tests.databases import Unavailable
from tests.machine import (
    die_with_parent,
    directories,
    first,
    free_port,
    shown,
    temp_root,
    unprivileged,
)

START_LIMIT = 60.0
STOP_LIMIT = 20.0


class RabbitMQ:
    """One node on free ports of 127.0.0.1, with a port mapper (epmd) of its own."""

    def __init__(self) -> None:
        # Not Debian's rabbitmq-server in /usr/sbin, which goes to the folders of the service.
        places = directories("/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/homebrew/sbin")
        self.binary = self._found(places, "rabbitmq-server")
        self.mapper_binary = self._found(places, "epmd")
        self.unprivileged = unprivileged(("rabbitmq",))
        self.name = f"distlock-{secrets.token_hex(4)}@localhost"
        self.url = ""
        self.processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> RabbitMQ:
        self.home = Path(tempfile.mkdtemp(prefix="distlock-rabbitmq-", dir=temp_root())).resolve()
        if self.unprivileged:
            os.chown(self.home, self.unprivileged["user"], self.unprivileged["group"])
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def _start(self) -> None:
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            port, mapper, distribution = free_port(), free_port(), free_port()
            self.url = f"amqp://guest:guest@127.0.0.1:{port}//"
            environment = self._environment(port, mapper, distribution)
            self._run(environment, str(self.mapper_binary), "-port", str(mapper))
            self._run(environment, str(self.binary))
            while time.monotonic() < deadline and self.processes[-1].poll() is None:
                if self._is_ours(port):
                    return
                time.sleep(0.1)
            self._end()
        log = (self.home / "log").read_text(errors="replace")
        raise Unavailable(f"{self.binary} does not start: {log[-500:]}")

    def _environment(self, port: int, mapper: int, distribution: int) -> dict[str, str]:
        return {
            "PATH": f"{self.mapper_binary.parent}:{os.defpath}",
            "LC_ALL": "C.UTF-8",
            "HOME": str(self.home),  # of the node's cookie, too
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(mapper),
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": str(self.home / "mnesia"),
            "RABBITMQ_LOG_BASE": str(self.home / "logs"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(self.home / "plugins"),
            "RABBITMQ_CONF_ENV_FILE": str(self.home / "environment"),
            "RABBITMQ_CONFIG_FILE": str(self.home / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(self.home / "advanced.config"),
            # The process that is started becomes the node, without a shell that waits for it.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                "+S 1 -kernel inet_dist_use_interface {127,0,0,1}"
            ),
        }

    def _run(self, environment: dict[str, str], *command: str) -> None:
        with open(self.home / "log", "ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
                **self.unprivileged,
            )
        self.processes.append(process)

    def _is_ours(self, port: int) -> bool:
        with contextlib.suppress(OSError, amqp.AMQPError):
            with amqp.Connection(f"127.0.0.1:{port}", connect_timeout=2, read_timeout=5) as opened:
                properties: dict[str, Any] = opened.server_properties
                cluster: str = properties["cluster_name"]  # with the name of the host
                return cluster.partition("@")[0] == self.name.partition("@")[0]
        return False

    def _stop(self) -> None:
        try:
            self._end()
        finally:
            shutil.rmtree(self.home, ignore_errors=True)

    def _end(self) -> None:
        while self.processes:
            process = self.processes.pop()  # the node before its mapper
            process.terminate()
            try:
                process.wait(STOP_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(STOP_LIMIT)

    @staticmethod
    def _found(places: list[Path], name: str) -> Path:
        found = first(places, name)
        if found is None:
            raise Unavailable(f"no {name} found (looked in {shown(places)})")
        return found
