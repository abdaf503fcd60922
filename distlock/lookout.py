"""The lookout: a thread per process and database that wakes those who wait for busy locks.

Whoever meets a busy lock joins the queue of its name here, and only the head of a queue tries
again: when the lookout wakes it, and before that not at all. So a release costs one try per
process and not one per waiter, and those of one process are served in the order they came.

Where the database notifies, the lookout listens on a connection of its own, and looks at a row
only to mark it as wanted (Note [Wanted] in `backends/postgresql.py`) and when the lease that it saw
would have ended. Else, and while a row is pinned and so cannot be marked, it looks again and
again: at all awaited names in one statement, soon after something has changed, and a few times a
second while nothing does. If it cannot listen, it says so once, and tries again later.

For those who have tickets (`turns.py`) it gives signs of life, and it gives back what was given up.

A wake-up is a hint, never a grant: whoever is woken asks the database.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from contextlib import suppress

from django.db import Error

from .backends import backend_for, tickets
from .background import Background, after_fork
from .connections import LIMIT, Private, private
from .deadlines import clock, jitter
from .ears import Ears
from .events import log
from .queues import FIRST, LONGEST, PATIENCE, Name, Queue, Waiter

DEAF = 10.0
"""Seconds until one tries to listen again."""
IDLE = 10.0
"""Seconds after which a connection that listens for nobody is closed."""
STUCK = LIMIT + 1.0
"""Seconds without a sign of life after which nobody relies on the lookout any more."""
UNUSED = 60.0
"""Seconds after which the connection that looks is closed, if nobody else uses it either."""
BATCH = 500
"""Names in one statement."""
LIFE = 4.0
"""Seconds that a sign of life holds for a ticket: so long a dead waiter may be waited for."""
KEEP = LIFE / 3
"""Seconds between two signs of life: one that fails soon does not cost the ticket."""


class Lookout:
    """What this process waits for in one database."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._mutex = threading.RLock()  # see Note [Collected]
        self._queues: dict[Name, Queue] = {}
        self._ears = Ears(alias)
        self._private = private(alias)
        self._notifies = self._private.backend.notifies
        self._listen_at = 0.0
        self._deaf = False
        self._unused_since = 0.0
        self._busy_since = math.inf
        self._fails_since = math.inf
        self._planned = 0.0
        self._keep_at = math.inf
        self._given_up: deque[tuple[Name, str]] = deque()
        self._thread = Background(
            f"distlock-lookout-{alias}", self._step, self._ears.close, self._ears
        )

    def is_awaited(self, key: Name) -> bool:
        """Whether somebody of this process stands in line for a name."""
        return key in self._queues

    def join(self, key: Name, waiter: Waiter) -> None:
        """Stand in line for a name, and be woken when it is time to try."""
        with self._mutex:
            queue = self._queues.setdefault(key, Queue(key))
            queue.waiters.append(waiter)
            queue.arrange()
            is_new = len(queue.waiters) == 1
            if waiter.ticket() is not None and self._keep_at == math.inf:
                self._keep_at, is_new = clock() + KEEP, True
        if is_new:
            self._thread.ensure_started()
            self._ears.set()

    def leave(self, key: Name, waiter: Waiter, *, granted: bool) -> None:
        """Stand in line no more. Unless `granted`, it is the next one's turn.

        Harmless if an exception came before one stood there.
        """
        with self._mutex:
            queue = self._queues.get(key)
            if queue is None or waiter not in queue.waiters:
                return
            was_first = queue.waiters[0] is waiter
            queue.waiters.remove(waiter)
            if was_first:
                queue.called = math.inf
            if not queue.waiters:
                del self._queues[key]
            elif granted:
                queue.delay = FIRST
            elif was_first:
                queue.wake()
        if granted:
            self.look_soon(key)

    def look_soon(self, key: Name) -> None:
        """Note that somebody else has the lock now, for nobody knows how long."""
        with self._mutex:
            queue = self._queues.get(key)
            soon = queue.look_soon() if queue and queue.waiters else math.inf
        if soon < self._planned:
            self._ears.set()

    def tear(self, key: Name, owner: str) -> None:
        """Give a ticket back for whoever cannot wait for the database. Blocks nobody."""
        self._given_up.append((key, owner))
        self._thread.ensure_started()
        self._ears.set()

    def rouse(self) -> None:
        """Let everybody in a line try, and see what the time is: a test has moved the clock on."""
        with self._mutex:
            for queue in self._queues.values():
                for waiter in queue.waiters:
                    waiter.wake()

    @property
    def works(self) -> bool:
        """Whether one can rely on being woken."""
        return self._thread.is_alive and clock() - self._busy_since < STUCK

    def forget(self) -> None:
        """Drop what it owns in a forked child, or if it was made in vain."""
        self._ears.forget()

    # -- the thread ------------------------------------------------------------------------------

    def _step(self) -> float:
        self._busy_since = clock()
        try:
            self._hear()
            self._listen()
            due = self._due()
            for start in range(0, len(due), BATCH):
                self._look(due[start : start + BATCH])
            written = [self._keep_tickets(), self._tear_tickets()]
            if due or any(written):
                self._hear()  # what came with the answer to a statement wakes no sleeper
            return self._delay()
        except BaseException:
            self._wake_all()  # who tries by itself learns more
            raise
        finally:
            self._busy_since = math.inf

    def _listen(self) -> None:
        """Open the connection that listens, if somebody waits, or close what is of no use."""
        now = clock()
        if self._queues:
            self._unused_since = now
            if self._notifies and not self._ears.open and now >= self._listen_at:
                self._try_to_listen()
            return
        if self._ears.open and now - self._unused_since >= IDLE:
            self._ears.close()
        self._private.close_if_unused(UNUSED)

    def _try_to_listen(self) -> None:
        self._listen_at = clock() + jitter(DEAF)
        try:
            reason = "" if self._ears.listen() else "a pooler is in between"
        except Error as error:
            reason = str(error)
        if reason and not self._deaf:
            log(
                logging.WARNING,
                "lock_waiting_polls alias=%r: cannot listen for releases, so those who wait look "
                "every %s s: %s",
                alias=self._alias,
                every=LONGEST,
                reason=reason,
            )
        self._deaf = bool(reason)
        if self._ears.open:
            self._look_at_all()

    def _hear(self) -> None:
        """Wake those whose lock was released."""
        if not self._ears.open:
            return
        try:
            heard = self._ears.heard()
        except Exception as error:  # the driver's own, too: the connection is gone
            self._stop_listening(error)
            return
        with self._mutex:
            for key in heard:
                if queue := self._queues.get(key):
                    queue.delay = FIRST
                    queue.due = min(queue.due, clock() + PATIENCE)
                    queue.wake()

    def _stop_listening(self, reason: object) -> None:
        text = "lock_listener_lost alias=%r: %s"
        log(logging.INFO, text, alias=self._alias, reason=reason)
        self._ears.close()
        self._listen_at = clock()
        self._look_at_all()

    def _wake_all(self) -> None:
        with self._mutex:
            for queue in self._queues.values():
                queue.wake()

    def _look_at_all(self) -> None:
        """What was said while nobody listened is lost: look at every name now."""
        with self._mutex:
            for queue in self._queues.values():
                queue.due = 0.0

    def _due(self) -> list[Queue]:
        """Return what to look at: if anything, then all that nobody tells about, in one go."""
        now = clock()
        with self._mutex:
            self._queues = {key: queue for key, queue in self._queues.items() if queue.waiters}
            queues = list(self._queues.values())
        if all(queue.due > now for queue in queues):
            return []
        return [queue for queue in queues if queue.due <= now or not queue.told]

    def _look(self, queues: list[Queue]) -> None:
        try:
            with self._speaker.use() as connection:
                seen = backend_for(connection).look(
                    connection, [queue.key for queue in queues], mark=self._ears.open
                )
        except Error as error:
            log(logging.INFO, "lock_look_failed alias=%r: %s", alias=self._alias, error=error)
            self._fails_since = min(self._fails_since, clock())
            with self._mutex:
                for queue in queues:
                    queue.due = clock() + jitter(LONGEST)
            if clock() - self._fails_since > STUCK:  # longer than a server takes to restart
                self._wake_all()  # who tries by itself learns more
            return
        self._fails_since = math.inf
        pace = jitter(1.0)  # one for all: the soonest of many would always be early
        with self._mutex:
            for queue in queues:
                queue.learn(seen.get(queue.key), told=self._ears.open, pace=pace)

    def _keep_tickets(self) -> bool:
        """Give signs of life for those of this process who have tickets; say if one was sent.

        While anybody waits there is a next time: whoever is not well now, or has just lost its
        ticket, may have one to keep by then.
        """
        if clock() < self._keep_at:
            return False
        with self._mutex:
            waiters = [waiter for queue in self._queues.values() for waiter in queue.waiters]
            kept = [number for one in waiters if one.is_well and (number := one.ticket())]
            self._keep_at = clock() + KEEP if waiters else math.inf
        with suppress(Error):
            for start in range(0, len(kept), BATCH):
                with self._speaker.use() as connection:
                    tickets.keep(connection, kept[start : start + BATCH], int(LIFE * 1e6))
        return bool(kept)

    def _tear_tickets(self) -> bool:
        """Give back what was given up; say if a statement was sent.

        If that fails, the tickets count for nothing soon: nobody gives signs of life for them.
        """
        torn: dict[Name, list[str]] = {}
        while self._given_up:
            key, owner = self._given_up.popleft()
            torn.setdefault(key, []).append(owner)
        with suppress(Error):
            for (name, slot), owners in torn.items():
                for start in range(0, len(owners), BATCH):
                    with self._speaker.use() as connection:
                        tickets.tear(connection, name, slot, owners[start : start + BATCH])
        return bool(torn)

    @property
    def _speaker(self) -> Private:
        """The connection for statements. Each may bring messages along, if it listens, too."""
        return self._ears.private if self._ears.open else self._private

    def _delay(self) -> float:
        now = clock()
        with self._mutex:
            dues = [queue.due for queue in self._queues.values()]
            dues.append(self._keep_at)
            if self._queues and self._notifies and not self._ears.open:
                dues.append(self._listen_at)
            self._planned = min([now + IDLE, *dues])
        return max(0.0, self._planned - now)


_lookouts: dict[str, Lookout] = {}
_mutex = threading.Lock()


def lookout(alias: str) -> Lookout:
    """Return this process's lookout in one database."""
    found = _lookouts.get(alias)
    if found is None:
        made = Lookout(alias)
        with _mutex:
            found = _lookouts.setdefault(alias, made)
        if found is not made:
            made.forget()
    return found


def rouse() -> None:
    """Rouse everybody who waits in this process."""
    for one in list(_lookouts.values()):
        one.rouse()


def _forget() -> None:
    global _mutex
    _mutex = threading.Lock()
    for one in _lookouts.values():
        one.forget()
    _lookouts.clear()


after_fork(_forget)
