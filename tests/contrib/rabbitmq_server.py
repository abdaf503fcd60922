"""A private RabbitMQ node for the workers: it answers by its own name, or it is not ours."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import Any

import amqp

from tests.contrib.private_broker import PrivateBroker, found
from tests.machine import free_port

# Not Debian's rabbitmq-server in /usr/sbin, which goes to the folders of the service.
PLACES = ("/usr/lib/rabbitmq/bin", "/usr/local/sbin", "/opt/homebrew/sbin")


class RabbitMQ(PrivateBroker):
    """One node on free ports of 127.0.0.1, with a port mapper (epmd) of its own."""

    start_limit = 60.0
    users = ("rabbitmq",)

    def __init__(self) -> None:
        super().__init__()
        self.binary = found(PLACES, "rabbitmq-server")
        self.mapper_binary = found(PLACES, "epmd")
        self.name = f"distlock-{secrets.token_hex(4)}@localhost"

    def launch(self) -> None:
        port, mapper, distribution = free_port(), free_port(), free_port()
        self.url = f"amqp://guest:guest@127.0.0.1:{port}//"
        self.port = port
        environment = self._environment(port, mapper, distribution)
        self.run([str(self.mapper_binary), "-port", str(mapper)], environment)
        self.run([str(self.binary)], environment)

    def is_ours(self) -> bool:
        at = f"127.0.0.1:{self.port}"
        with contextlib.suppress(OSError, amqp.AMQPError):
            with amqp.Connection(at, connect_timeout=2, read_timeout=5) as opened:
                properties: dict[str, Any] = opened.server_properties
                cluster: str = properties["cluster_name"]  # with the name of the host
                return cluster.partition("@")[0] == self.name.partition("@")[0]
        return False

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
