"""A TCP proxy in front of a database that knows where a message ends, to cut an exchange there.

    with Proxy(host, port, "postgresql") as proxy:  # connect to 127.0.0.1, proxy.port
        proxy.disturb(Cut("client", 2))  # breaks before the third message reaches the server
        held = proxy.disturb(Hold(b"COMMIT"))  # the message waits in the proxy ..
        held.wait()
        held.cut_client()  # .. of a client that has gone, for a server that still expects it ..
        held.deliver()  # .. and arrives

It splits both protocols, in both directions. What is said after the log-in counts, over all
connections, from the last `disturb()` on: the client's messages and the server's apart, each from
0. A disturbance happens once, and then all passes again. Every wait has an end, and `close()` ends
every thread and socket.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

LIMIT = 30.0
"""Seconds after which a wait gives up."""
OTHER = {"client": "server", "server": "client"}
ENCRYPTION = (80877103, 80877104)
"""What a PostgreSQL client may ask for before its log-in (SSL, GSSAPI): the answer is no."""


@dataclass(frozen=True)
class Message:
    """One message, whole, with its head."""

    link: Link
    sender: str  # "client" or "server"
    number: int
    data: bytes

    def pass_on(self) -> None:
        """Send it to the other side. If that has gone, its own pump sees to it."""
        with suppress(OSError):
            self.link.sockets[OTHER[self.sender]].sendall(self.data)


class Rule:
    """What is to happen to one message. This one never happens, and only counts."""

    def __init__(self) -> None:
        self.said: list[Message] = []
        """All that counts, in its order."""
        self.message: Message | None = None
        self.happened = threading.Event()
        """Set once the message is here, and nobody has felt anything yet."""
        self.over = threading.Event()

    def count(self, sender: str) -> int:
        """How many messages of one side there were."""
        return sum(message.sender == sender for message in self.said)

    def matches(self, message: Message) -> bool:
        """Whether it is this message. Called for each in turn, under the proxy's mutex."""
        return False

    def act(self, message: Message) -> None:
        """Do it, in the thread that carries what this side says."""
        raise NotImplementedError

    def end(self) -> None:
        """Let go of what waits; the proxy is closing."""


class Cut(Rule):
    """Break the connection before a message is passed on, or after it.

    After a client's message means: the server has taken it, and nobody hears its answer.
    `server_stays`: only the client sees it. `down`: all connections break, and the proxy refuses
    new ones until `come_up()`.
    """

    def __init__(
        self,
        sender: str,
        number: int,
        *,
        after: bool = False,
        server_stays: bool = False,
        down: bool = False,
    ) -> None:
        super().__init__()
        self.point = (sender, number)
        self.after, self.server_stays, self.down = after, server_stays, down

    def __str__(self) -> str:
        what = self.message.data[:60] if self.message else b"never came"
        return f"{'after' if self.after else 'before'} {self.point} {what!r}"

    def matches(self, message: Message) -> bool:
        return (message.sender, message.number) == self.point

    def act(self, message: Message) -> None:
        link = message.link
        if self.after and message.sender == "client":
            link.mute()
            message.pass_on()
            link.server_spoke.wait(1)  # a farewell has no answer
        elif self.after:
            message.pass_on()
        if self.down:
            link.proxy.go_down()
        link.cut(server=not self.server_stays)


class Hold(Rule):
    """Keep the client's first message that contains `text`, and what it says after that.

    `answer`: the message passes, and the server's answer is kept instead.
    """

    def __init__(self, text: bytes, *, answer: bool = False) -> None:
        super().__init__()
        self._text = text
        self._answer = answer
        self._asked: Link | None = None
        self._passes = False
        self._decided = threading.Event()

    def matches(self, message: Message) -> bool:
        if message.sender == "client" and self._asked is None and self._text in message.data:
            self._asked = message.link
            return not self._answer
        return message.sender == "server" and self._answer and self._asked is message.link

    def act(self, message: Message) -> None:
        self._decided.wait(LIMIT)
        if self._passes:
            message.pass_on()

    def wait(self) -> Link:
        """Return when the message is here: the connection that it came on."""
        assert self.happened.wait(LIMIT), f"{self._text!r} was never said"
        assert self.message is not None
        return self.message.link

    def cut_client(self) -> None:
        """Break the client's side; the server knows nothing of it."""
        self.wait().cut(server=False)

    def deliver(self) -> None:
        """Pass it on; return when the server has answered it."""
        link = self.wait()
        link.server_spoke.clear()
        self._passes = True
        self._decided.set()
        assert self._answer or link.server_spoke.wait(LIMIT), "the server did not answer"

    def drop(self) -> None:
        """Forget it, and break the connection on both sides."""
        self.wait().cut()
        self._decided.set()

    def end(self) -> None:
        self._decided.set()


class Link:
    """One client's connection, and the one to the server that belongs to it."""

    def __init__(self, proxy: Proxy, client: socket.socket, server: socket.socket) -> None:
        self.proxy = proxy
        self.sockets = {"client": client, "server": server}
        self.port: int = client.getpeername()[1]
        """The client's own, by which it can be told from others."""
        self.server_spoke = threading.Event()
        self._logged_in = self._muted = False
        self._server_stays = False
        self._threads = [
            threading.Thread(target=self._carry, args=(sender,), name="proxy", daemon=True)
            for sender in OTHER
        ]
        for thread in self._threads:
            thread.start()

    def cut(self, *, server: bool = True) -> None:
        """Break the connection: for both sides, or only for the client."""
        self._server_stays = not server
        for side in OTHER if server else ("client",):
            with suppress(OSError):
                self.sockets[side].shutdown(socket.SHUT_RDWR)

    def mute(self) -> None:
        """Let nothing through any more that the server says."""
        self._muted = True
        self.server_spoke.clear()

    def close(self) -> None:
        """Break it, and wait until nothing is left of it."""
        self.cut()
        for thread in self._threads:
            thread.join(LIMIT)
            assert not thread.is_alive(), "a thread of the proxy hangs"
        for one in self.sockets.values():
            one.close()

    def _carry(self, sender: str) -> None:
        """Carry what one side says to the other, to its end."""
        with suppress(OSError):
            for data in self._messages(sender):
                self.proxy.going.wait(LIMIT)
                counts = self._logged_in  # the last word of the log-in itself does not
                if sender == "server":
                    self._logged_in = counts or self.proxy.ends_log_in(data)
                    self.server_spoke.set()
                    if self._muted:
                        continue
                if counts:
                    self.proxy.carry(self, sender, data)
                else:
                    Message(self, sender, 0, data).pass_on()
        if not self._server_stays:
            self.cut()

    def _messages(self, sender: str) -> Iterator[bytes]:
        source, waiting, first = self.sockets[sender], b"", sender == "client"
        while data := source.recv(65536):
            waiting += data
            while 0 < (size := self.proxy.size(waiting, first)) <= len(waiting):
                message, waiting = waiting[:size], waiting[size:]
                if first and self.proxy.asks_for_encryption(message):
                    source.sendall(b"N")
                    continue
                first = False
                yield message


R = TypeVar("R", bound=Rule)


class Proxy:
    """The proxy, from its making to `close()`. `vendor` is "postgresql" or "mysql"."""

    def __init__(self, host: str, port: int, vendor: str) -> None:
        self._target = (host or "127.0.0.1", port)
        self._type = 1 if vendor == "postgresql" else 0  # a byte before the length
        self._mutex = threading.Lock()
        self._rules: list[Rule] = [Rule()]
        self._links: list[Link] = []
        self._open = self._up = True
        self.going = threading.Event()
        self.going.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def disturb(self, rule: R) -> R:
        """Let a rule happen to the messages from here on; a plain `Rule()` only counts them."""
        with self._mutex:
            self._rules.append(rule)
        return rule

    def stand_still(self) -> None:
        """Pass nothing on any more, and close nothing, until `go_on()`."""
        self.going.clear()

    def go_on(self) -> None:
        """Pass on again, and first what has come meanwhile."""
        self.going.set()

    def go_down(self) -> None:
        """Break all connections, and refuse new ones until `come_up()`."""
        with self._mutex:
            self._up = False
            for link in self._links:
                link.cut()

    def come_up(self) -> None:
        """Accept connections again."""
        self._up = True

    def close(self) -> None:
        """Break all connections, and end every thread and socket."""
        self._open = False
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the proxy still accepts"
        self._listener.close()
        self.go_on()
        for rule in self._rules:
            rule.end()
        for link in self._links:
            link.close()

    # -- for the links ---------------------------------------------------------------------------

    def carry(self, link: Link, sender: str, data: bytes) -> None:
        """Pass on a message that counts, unless it is the one that the rule is about."""
        with self._mutex:
            rule = self._rules[-1]
            message = Message(link, sender, rule.count(sender), data)
            rule.said.append(message)
            matches = not rule.happened.is_set() and rule.matches(message)
            if matches:
                rule.message = message
                rule.happened.set()
        if matches:
            rule.act(message)
            rule.over.set()
        else:
            message.pass_on()

    def size(self, head: bytes, first: bool) -> int:
        """Return the length of the message that begins like this; 0 if that cannot be told yet."""
        if not self._type:
            return 4 + int.from_bytes(head[:3], "little") if len(head) >= 4 else 0
        at = 0 if first else 1
        return at + int.from_bytes(head[at : at + 4], "big") if len(head) >= at + 4 else 0

    def asks_for_encryption(self, first: bytes) -> bool:
        """Whether a client's first message is not its log-in yet."""
        return bool(self._type) and int.from_bytes(first[4:8], "big") in ENCRYPTION

    def ends_log_in(self, data: bytes) -> bool:
        """Whether after this message of the server the client may send statements."""
        if self._type:
            return data[:1] == b"Z"  # ready for query
        return data[3] > 1 and data[4:5] == b"\0"  # not the greeting, and OK

    def _accept(self) -> None:
        while self._open:
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            try:
                server = socket.create_connection(self._target, LIMIT)
            except OSError:
                client.close()
                continue
            for one in (client, server):
                one.settimeout(None)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._mutex:
                if self._up:
                    self._links.append(Link(self, client, server))
                    continue
            client.close()
            server.close()
