"""A private Redis server for the workers: it answers by its own pid, or it is not ours."""

from __future__ import annotations

import redis

from tests.contrib.private_broker import PrivateBroker, found
from tests.machine import free_port

PLACES = ("/usr/bin", "/usr/local/bin", "/opt/homebrew/bin")


class Redis(PrivateBroker):
    """One server on a free port of 127.0.0.1, which keeps nothing on disk."""

    def __init__(self) -> None:
        super().__init__()
        self.binary = found(PLACES, "redis-server", "valkey-server")

    def launch(self) -> None:
        port = free_port()
        self.url = f"redis://127.0.0.1:{port}"
        options = f"--port {port} --bind 127.0.0.1 --appendonly no --dir {self.home}"
        self.run([str(self.binary), *options.split(), "--save", ""])

    def is_ours(self) -> bool:
        with redis.Redis.from_url(self.url, socket_timeout=2) as client:
            try:
                answer: dict[str, object] = client.info("server")  # type: ignore[assignment]
            except redis.RedisError:
                return False
        return answer["process_id"] == self.processes[-1].pid
