"""The lock: an immutable description of what is to be held, and how."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, ParamSpec, Protocol, TypeVar, overload

from django.core.exceptions import SynchronousOnlyOperation
from django.db import Error, InterfaceError, OperationalError

from . import contexts, signals, waiting
from .arguments import (
    DEFAULT,
    Default,
    Name,
    checked_alias,
    checked_key,
    checked_name,
    checked_note,
    checked_on_busy,
    flag_of,
    known_alias,
    wait_of,
)
from .atomics import AtomicBlock, refuse_nesting
from .backends import backend_for
from .backends.base import Claim, Grant, Holder
from .background import soon
from .conf import settings
from .deadlines import Deadline, Seconds, clock, seconds
from .decorators import wrap
from .exceptions import AlreadyHeld, LockBusy, LockError
from .keeper import can_keep, keeper
from .leases import Lease
from .lookout import lookout
from .places import Place, place
from .terms import Key, Term

P = ParamSpec("P")
R = TypeVar("R")


def lock(
    name: Name,
    *,
    ttl: Seconds | Default = DEFAULT,
    wait: Seconds | Default | None = DEFAULT,
    renew: bool | Default = DEFAULT,
    atomic: bool = False,
    reentrant: bool = False,
    min_hold: Seconds | None = None,
    max_hold: Seconds | None = None,
    crash_safe: bool | Default = DEFAULT,
    on_busy: Literal["raise", "skip"] = "raise",
    note: str = "",
    using: str | None = None,
) -> Lock:
    """Describe a lock: for `with`, as a decorator, or with `acquire()` and `try_acquire()`.

    Durations are seconds or `timedelta`. What is not given comes from the setting `DISTLOCK`.

    name: 1 to 255 characters, compared exactly. In a decorator it may hold `{argument}` fields,
        or be a callable that gets the bound arguments as a dict.
    ttl: how long the lease lasts after its last renewal (30).
    wait: how long to wait while it is busy (10); 0 tries once, `None` waits for ever.
    renew: keep the lease alive while this process lives.
    atomic: run the body in a transaction of its own; work and release commit together.
    reentrant: taking it again in the same thread or task nests; otherwise that is `AlreadyHeld`.
    min_hold: keep the lock at least this long after it was acquired, even if released sooner.
    max_hold: stop renewing after this long.
    crash_safe: `False` lets the grant be forgotten if the database server crashes.
    on_busy: in a decorator, "raise" `LockBusy` or "skip" the call and return `None`.
    note: free text for people who look at the lock.
    using: the database alias.

    Raises `ValueError` or `TypeError` that names the argument.
    """
    return Lock(
        name=checked_key(name),
        ttl=None if isinstance(ttl, Default) else seconds(ttl, "ttl", positive=True),
        wait=wait_of(wait),
        renew=flag_of(renew, "renew"),
        atomic=flag_of(atomic, "atomic") or False,
        reentrant=flag_of(reentrant, "reentrant") or False,
        min_hold=0.0 if min_hold is None else seconds(min_hold, "min_hold"),
        max_hold=None if max_hold is None else seconds(max_hold, "max_hold", positive=True),
        crash_safe=flag_of(crash_safe, "crash_safe"),
        on_busy=checked_on_busy(on_busy),
        note=checked_note(note),
        using=checked_alias(using),
    )


class Block(Protocol):
    """What a `with` block of a lock ends with."""

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """End the block."""


@dataclasses.dataclass(frozen=True, eq=False)
class Lock:
    """A description, made by `lock()`. Holds nothing; safe to share between threads."""

    name: Name
    ttl: float | None
    wait: float | Default | None
    renew: bool | None
    atomic: bool
    reentrant: bool
    min_hold: float
    max_hold: float | None
    crash_safe: bool | None
    on_busy: str
    note: str
    using: str | None
    slot: int = 0
    _entered: list[tuple[contexts.Context, Block]] = dataclasses.field(
        default_factory=list, init=False, repr=False
    )

    def acquire(self, wait: Seconds | Default | None = DEFAULT) -> Lease:
        """Return a lease, waiting up to `wait` seconds (default: the lock's own).

        The caller must release it. Raises `LockBusy` when the wait is over, `AlreadyHeld` if this
        thread or task has the lock, and what the database raises if it cannot be asked.

        Inside a REPEATABLE READ or SERIALIZABLE transaction it raises `LockError`, for what that
        reads may be older than the lock. Their level is known once per connection; one that is set
        with SET TRANSACTION is not noticed, and is the caller's own affair: take the lock first.
        """
        self._refuse_atomic("acquire()")
        return self._acquire(wait_of(wait))

    def try_acquire(self) -> Lease | None:
        """Return a lease if the lock is free now, else `None`. The caller must release it."""
        self._refuse_atomic("try_acquire()")
        return self._attempt(Deadline(0))

    def holder(self) -> Holder | None:
        """Return who holds the lock now, or `None`."""
        name, alias = self._literal_name(), self._alias()
        where = place(alias)
        holder = backend_for(where.connection).holder
        return where.run(lambda connection: holder(connection, name, self.slot))

    def __enter__(self) -> Lease:
        alias, context = self._alias(), contexts.current()
        nested = self._nested(context, (alias, self._literal_name(), self.slot))
        if self.atomic and nested is None:
            refuse_nesting(self.name, alias)
        lease = nested or self._acquire(DEFAULT)
        block = AtomicBlock(lease, alias) if self.atomic and nested is None else lease
        self._entered.append((context, block))
        return lease

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A generator may be closed in another thread than the one that it ran in.
        context, entered = contexts.current(), self._entered[::-1]
        found = next((entry for entry in entered if entry[0] is context), entered[0])
        self._entered.remove(found)
        found[1].__exit__(exc_type, exc, traceback)

    @overload
    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...

    @overload
    def __call__(self, function: Any) -> Any: ...

    def __call__(self, function: Any) -> Any:
        """Decorate a function: each call holds the lock that `name` gives for its arguments."""
        return wrap(self, function)

    def named(self, name: str) -> Lock:
        """Return this description with another name, checked."""
        return dataclasses.replace(self, name=checked_name(name))

    # -- one acquisition -------------------------------------------------------------------------

    def _acquire(self, wait: float | Default | None) -> Lease:
        if isinstance(wait, Default):
            wait = self._waits()
        deadline = Deadline(wait)
        lease = self._attempt(deadline)
        if lease is not None:
            return lease
        holder, waited = self.holder(), deadline.passed
        name = self._literal_name()
        signals.lock_busy.send_robust(sender=Lock, name=name, holder=holder, waited=waited)
        who = f"it is held by {holder}" if holder else "its row was in use until the last moment"
        raise LockBusy(
            f"The lock {name!r} was not free within {waited:.3g} s: {who}.",
            name=name,
            holder=holder,
            waited=waited,
        )

    def _attempt(self, deadline: Deadline) -> Lease | None:
        name, alias = self._literal_name(), self._alias()
        context, key = contexts.current(), (alias, name, self.slot)
        if nested := self._nested(context, key):
            return nested
        where = place(alias, to_acquire=True)
        if where.transaction is not None and (
            adopted := where.transaction.adopt(alias, name, self.slot)
        ):
            return Lease(adopted, context)
        claim = self._claim(name)
        if where.own and where.transaction is not None:
            deadline = Deadline(0)  # SQLite: nobody else could free it meanwhile
        requested = clock()

        def attempt(waited: float) -> tuple[Grant, float] | None:
            nonlocal requested
            requested = clock()
            grant = where.grant(claim, waited)
            return None if grant is None else (grant, waited)

        try:
            granted = waiting.wait_for(attempt, deadline, self._line(where))
        except (LockError, SynchronousOnlyOperation):
            raise
        except BaseException as error:
            if not isinstance(error, Error) or isinstance(error, OperationalError | InterfaceError):
                self._forsake(where, claim, requested)
            raise
        if granted is None:
            return None
        grant, waited = granted
        term = self._term(alias, claim, grant, requested)
        return self._begin(where, term, context, waited)

    def _line(self, where: Place) -> waiting.Line | None:
        """Return where to stand in line, if another connection can see when the lock is free."""
        alias = where.connection.alias
        if where.own or not can_keep(alias):
            return None
        return waiting.Line(lookout(alias), (self._literal_name(), self.slot))

    def _nested(self, context: contexts.Context, key: Key) -> Lease | None:
        term = context.held.get(key)
        if term is None or term.lost or term.over:
            return None
        if not self.reentrant:
            raise AlreadyHeld(
                f"This thread or task already holds the lock {key[1]!r}; waiting for it would "
                "never end. Pass reentrant=True to nest, or split the function.",
                name=key[1],
            )
        return Lease(term, context)

    def _claim(self, name: str) -> Claim:
        durable = settings().CRASH_SAFE if self.crash_safe is None else self.crash_safe
        return Claim(
            name=name,
            slot=self.slot,
            owner=uuid.uuid4().hex,
            ttl=int(self._ttl() * 1_000_000),
            min_hold=int(self.min_hold * 1_000_000),
            note=self.note,
            thread=contexts.caller.get(),
            durable=durable and not self.atomic,
        )

    def _term(self, alias: str, claim: Claim, grant: Grant, requested: float) -> Term:
        return Term(
            alias,
            claim.name,
            claim.slot,
            claim.owner,
            token=grant.token,
            ttl=self._ttl(),
            acquired_us=grant.acquired_us,
            expires_us=grant.expires_us,
            requested=requested,
            renew=settings().RENEW if self.renew is None else self.renew,
            min_hold=self.min_hold,
            max_hold=self.max_hold,
            on_lost=_tell_lost,
        )

    def _begin(self, where: Place, term: Term, context: contexts.Context, waited: float) -> Lease:
        lease = Lease(term, context)
        if where.transaction is not None:
            where.transaction.take(term, own=where.own)
        if not where.own and can_keep(term.alias):
            keeper.keep(term)
        signals.lock_acquired.send_robust(sender=Lock, lease=lease, waited=waited)
        return lease

    def _forsake(self, where: Place, claim: Claim, requested: float) -> None:
        """Let the keeper free what an acquire that broke off may have been granted."""
        alias = where.connection.alias
        if not where.own and can_keep(alias):
            keeper.finish(self._term(alias, claim, Grant(0, 0, 0), requested), lambda found: None)

    # -- what the arguments mean -----------------------------------------------------------------

    def _alias(self) -> str:
        return self.using or known_alias(settings().USING)

    def _ttl(self) -> float:
        return seconds(settings().TTL, "TTL") if self.ttl is None else self.ttl

    def _waits(self) -> float | None:
        wait = settings().WAIT if isinstance(self.wait, Default) else self.wait
        return None if wait is None else seconds(wait, "WAIT")

    def _literal_name(self) -> str:
        if isinstance(self.name, str):
            return self.name
        raise TypeError("A lock whose name is a callable can only be used as a decorator.")

    def _refuse_atomic(self, method: str) -> None:
        if self.atomic:
            raise TypeError(
                f"{method} cannot run a body in a transaction. Use a lock with atomic=True in a "
                "with block or as a decorator."
            )


def _tell_lost(term: Term, reason: str) -> None:
    lease = Lease(term, contexts.Context(), shares=False)
    soon(lambda: signals.lock_lost.send_robust(sender=Lease, lease=lease, reason=reason))
