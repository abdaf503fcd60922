"""The ears: a connection that listens for releases, and a bell. The lookout sleeps on both."""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import suppress

from django.db import InterfaceError

from .backends import backend_for
from .connections import Private, private
from .queues import SETTLE, Name


class Ears:
    """The connection of one process to one database. Only the lookout's thread may use it; any may
    ring."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._listening: object = None
        self._bell, self._button = socket.socketpair()
        self._bell.setblocking(False)
        self._button.setblocking(False)

    def set(self) -> None:
        """Ring."""
        with suppress(OSError):  # it is ringing already, or this is a forked child
            self._button.send(b"!")

    def clear(self) -> None:
        """Stop ringing."""
        with suppress(BlockingIOError):
            while self._bell.recv(4096):
                pass

    def wait(self, timeout: float) -> None:
        """Sleep until the bell rings, a message comes, or the connection breaks."""
        wire = self.private.wire if self.open else None
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._bell, selectors.EVENT_READ)
                if wire is not None:
                    selector.register(wire, selectors.EVENT_READ)
                selector.select(timeout)
        except (OSError, ValueError):  # it was closed just now, or no file can be opened any more
            time.sleep(min(timeout, SETTLE))

    @property
    def private(self) -> Private:
        """The connection."""
        return private(self._alias, to_listen=True)

    @property
    def open(self) -> bool:
        """Whether it listens, as far as is known."""
        return self._listening is not None

    def listen(self) -> bool:
        """Begin to listen; `False` if messages would not come through."""
        with self.private.use() as connection:
            if backend_for(connection).listen(connection):
                self._listening = connection
        if not self.open:
            self.close()
        return self.open

    def heard(self) -> list[Name]:
        """Return what has been said since the last time. Raises what says that it is gone."""
        if self.private.wire is None:  # else it would be opened again, to see that it is gone
            raise InterfaceError("the connection that listened was closed")
        with self.private.use() as connection:
            if connection is not self._listening:
                raise InterfaceError("the connection that listened was closed")
            return backend_for(connection).heard(connection)

    def close(self) -> None:
        """Listen no more."""
        self._listening = None
        self.private.close_if_unused()

    def forget(self) -> None:
        """Drop the bell: in a forked child, or if nobody will use it."""
        for end in (self._bell, self._button):
            end.close()
