"""The lock: an immutable description of what is to be held, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NoReturn, ParamSpec, TypeVar, overload

from asgiref.sync import sync_to_async
from django.db import Error

from . import contexts, signals
from .acquisitions import Acquisition
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
from .backends.base import Holder
from .backends.stats import LockStats
from .conf import settings
from .deadlines import Deadline, Seconds, seconds
from .decorators import wrap
from .exceptions import LockBusy, LockError
from .leases import Lease
from .places import place

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
    fair: bool = False,
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
    fair: first come, first served, across processes, among those who wait with `fair=True`; others
        may overtake them. Each wait costs a few statements more.
    min_hold: keep the lock at least this long after it was acquired, even if released sooner.
    max_hold: stop renewing after this long: the lock is free at most `ttl` later, unless a
        transaction holds it.
    crash_safe: `False` lets the grant be forgotten if the database server crashes.
    on_busy: in a decorator, "raise" `LockBusy` or "skip" the call and return `None`.
    note: free text, at most 255 characters, for people who look at the lock.
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
        fair=flag_of(fair, "fair") or False,
        min_hold=0.0 if min_hold is None else seconds(min_hold, "min_hold"),
        max_hold=None if max_hold is None else seconds(max_hold, "max_hold", positive=True),
        crash_safe=flag_of(crash_safe, "crash_safe"),
        on_busy=checked_on_busy(on_busy),
        note=checked_note(note),
        using=checked_alias(using),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Lock:
    """A description, made by `lock()`. Holds nothing; safe to share between threads."""

    name: Name
    ttl: float | None
    wait: float | Default | None
    renew: bool | None
    atomic: bool
    reentrant: bool
    fair: bool
    min_hold: float
    max_hold: float | None
    crash_safe: bool | None
    on_busy: str
    note: str
    using: str | None
    slot: int = 0
    resumes: bool = False
    """Whether to pass the `min_hold` that the same task has left behind."""
    quiet: bool = False
    """Whether to tell nobody of a busy lock, nor to ask who holds it: the library tries again."""
    _entered: list[tuple[contexts.Context, Lease | AtomicBlock]] = dataclasses.field(
        default_factory=list, init=False, repr=False
    )

    def acquire(self, wait: Seconds | Default | None = DEFAULT) -> Lease:
        """Return a lease, waiting up to `wait` seconds (default: the lock's own).

        The caller must release it. Raises `LockBusy` when the wait is over, `AlreadyHeld` if this
        thread or task has the lock, what the database raises if it cannot be asked, `TypeError`
        with `atomic=True` or a name that needs a call's arguments, and `ImproperlyConfigured`
        without the app or with bad settings.

        Inside a REPEATABLE READ or SERIALIZABLE transaction it raises `LockError`, for what that
        reads may be older than the lock. Their level is known once per connection; one that is set
        with SET TRANSACTION is not noticed, and is the caller's own affair: take the lock first.
        """
        self.refuse_atomic("acquire()")
        return self._acquire(wait_of(wait))

    def try_acquire(self) -> Lease | None:
        """Return a lease if the lock is free now, else `None`. The caller must release it.

        Raises what `acquire` raises, but for `LockBusy`.
        """
        self.refuse_atomic("try_acquire()")
        deadline = Deadline(0)
        lease = Acquisition(self, deadline).run()
        if lease is None:
            self._tell_busy(deadline.passed)
        return lease

    def holder(self) -> Holder | None:
        """Return who holds the lock now, or `None`. Raises what the database raises.

        While only `min_hold` keeps it, that is a `Holder` whose `owner` is empty.
        """
        name, alias = self.literal_name, self.alias
        where = place(alias)
        holder = where.backend.holder
        return where.run(lambda connection: holder(connection, name, self.slot))

    def stats(self) -> LockStats | None:
        """Return what the lock's row has counted, or `None` if it was never taken, or purged."""
        name, alias = self.literal_name, self.alias
        where = place(alias)
        stats = where.backend.stats
        return where.run(lambda connection: stats(connection, name, self.slot))

    async def aacquire(self, wait: Seconds | Default | None = DEFAULT) -> Lease:
        """Return a lease; see `acquire`. Waiting occupies no thread.

        Cancelled, it leaves no lease behind. The caller must `await lease.arelease()`.
        """
        self.refuse_atomic("aacquire()")
        return await self._aacquire(wait_of(wait))

    async def atry_acquire(self) -> Lease | None:
        """Return a lease if the lock is free now, else `None`; see `try_acquire`."""
        self.refuse_atomic("atry_acquire()")
        deadline = Deadline(0)
        lease = await Acquisition(self, deadline).arun()
        if lease is None:
            await sync_to_async(self._tell_busy)(deadline.passed)
        return lease

    async def aholder(self) -> Holder | None:
        """Return who holds the lock now, or `None`; see `holder`."""
        return await sync_to_async(self.holder)()

    async def astats(self) -> LockStats | None:
        """Return what the lock's row has counted; see `stats`."""
        return await sync_to_async(self.stats)()

    def __enter__(self) -> Lease:
        alias, context = self.alias, contexts.current()
        atomic = self.atomic and not context.holds((alias, self.literal_name, self.slot))
        if atomic:
            refuse_nesting(self.name, alias)
        lease = self._acquire(DEFAULT)
        self._entered.append((context, AtomicBlock(lease, alias) if atomic else lease))
        return lease

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._left().__exit__(exc_type, exc, traceback)

    async def __aenter__(self) -> Lease:
        self.refuse_atomic("async with")
        context = contexts.current()
        lease = await self._aacquire(DEFAULT)
        self._entered.append((context, lease))
        return lease

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._left().__aexit__(exc_type, exc, traceback)

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

    def _left(self) -> Any:
        """Return the block that ends: this thread's or task's latest one."""
        # A generator may be closed in another thread than the one that it ran in.
        context, entered = contexts.current(), self._entered[::-1]
        found = next((entry for entry in entered if entry[0] is context), entered[0])
        self._entered.remove(found)
        return found[1]

    # -- one acquisition -------------------------------------------------------------------------

    def _acquire(self, wait: float | Default | None) -> Lease:
        deadline = self._deadline(wait)
        return Acquisition(self, deadline).run() or self._give_up(deadline)

    async def _aacquire(self, wait: float | Default | None) -> Lease:
        deadline = self._deadline(wait)
        lease = await Acquisition(self, deadline).arun()
        return lease or await sync_to_async(self._give_up)(deadline)

    def _deadline(self, wait: float | Default | None) -> Deadline:
        return Deadline(self._waits() if isinstance(wait, Default) else wait)

    def _tell_busy(self, waited: float, holder: Holder | None = None) -> None:
        if not self.quiet:
            name = self.literal_name
            signals.lock_busy.send_robust(sender=Lock, name=name, holder=holder, waited=waited)

    def _give_up(self, deadline: Deadline) -> NoReturn:
        """Raise `LockBusy`, with who holds the lock, if that can be told."""
        if self.quiet:
            raise self._busy(deadline.passed, "somebody holds it")
        try:
            holder, waited = self.holder(), deadline.passed
        except (Error, LockError) as error:
            self._tell_busy(waited := deadline.passed)
            raise self._busy(waited, f"who holds it could not be asked ({error})") from error
        self._tell_busy(waited, holder)
        why = f"it is held by {holder}" if holder else "its row was in use until the last moment"
        raise self._busy(waited, why, holder)

    def _busy(self, waited: float, why: str, holder: Holder | None = None) -> LockBusy:
        name = self.literal_name
        message = f"The lock {name!r} was not free within {waited:.3g} s: {why}."
        return LockBusy(message, name=name, holder=holder, waited=waited)

    # -- what the arguments mean -----------------------------------------------------------------

    @property
    def alias(self) -> str:
        """The database that it lives in."""
        usual = settings().USING  # read in any case: a missing app is told there
        return self.using or known_alias(usual)

    def _waits(self) -> float | None:
        if not isinstance(self.wait, Default):
            return self.wait
        usual = settings().WAIT
        return None if usual is None else seconds(usual, "WAIT")

    @property
    def literal_name(self) -> str:
        """The name. Raises `TypeError` if that is a callable, which only a decorator can call."""
        if isinstance(self.name, str):
            return self.name
        raise TypeError("A lock whose name is a callable can only be used as a decorator.")

    def refuse_atomic(self, method: str) -> None:
        """Raise `TypeError` where no body can be run in a transaction."""
        if self.atomic:
            raise TypeError(
                f"{method} cannot run a body in a transaction. Use a lock with atomic=True in a "
                "with block or as a decorator."
            )
