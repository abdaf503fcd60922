"""One call of a job: look for its receipt, take its lock, run the body, write the receipt.

# Note [Receipts]
The receipt is looked for twice: before the lock, so that a duplicate costs one statement, and under
it, for whoever waited. It is written in the transaction that releases the lock, so that nobody can
be granted the lock and not see it, and it is lost if the lock was lost.

    atomic=True             BEGIN, body, receipt, release, COMMIT: the work, its receipt and the
                            release become facts together, or not at all
    inside a transaction    a savepoint around body and receipt; both, and the release, become
                            facts with the caller's COMMIT, and until then the lock stays held
    atomic=False            the row says "running", body, then BEGIN, receipt, release, COMMIT: who
                            is killed in between leaves work without a receipt, and it runs again

Django has no transactions across an `await`, so a coroutine function runs as `atomic=False` does,
and has to say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from django.db import connections, transaction
from django.utils.asyncio import async_unsafe

from . import receipts, signals
from .arguments import LONGEST_NAME
from .backends import backend_for
from .backends.base import EPOCH, MICROSECOND
from .connections import in_transaction, refresh
from .deadlines import clock
from .errands import Errand
from .exceptions import JobDuplicate
from .fields import json_of
from .leases import Lease
from .locks import Lock
from .receipts import PREFIX

if TYPE_CHECKING:
    from .jobs import Once
    from .models import Job

BUCKET = "@%Y-%m-%dT%H:%M:%SZ"
LONGEST_BUCKET = 38
"""Characters that `every` adds to a key at most: the moment, and the seconds of the span."""


class Call:
    """One call of a job, from the look for its receipt to its result."""

    def __init__(self, once: Once, key: str, body: Callable[[], Any], function: Any) -> None:
        self._once = once
        self._key = once.checked(key)
        self._body = body
        self._alias = once.lock.alias
        self._task = _task_of(function)
        self._started = clock()

    @async_unsafe("A coroutine must await arun(): this would block the event loop.")
    def run(self) -> Any:
        """Return what the body returns, or the answer for a duplicate."""
        found = self._find_first()
        if found is None:
            joins = in_transaction(connections[self._alias])
            with self._lock(atomic=self._once.atomic and not joins) as lease:
                found = self._find()
                if found is None:
                    result = self._work(lease, joins)
        if found is None:
            self._tell_done()
            return result
        return self._answer(found)

    async def arun(self) -> Any:
        """Return what the body returns, or the answer for a duplicate."""
        found = await Errand(self._find_first).run()
        if found is None:
            async with self._lock(atomic=False) as lease:
                found = await Errand(partial(self._begin_unless_done, lease)).run()
                if found is None:
                    result = await self._body()
                    await Errand(partial(self._finish, lease, result)).run()
        if found is None:
            await Errand(self._tell_done).run()
            return result
        return await Errand(partial(self._answer, found)).run()

    def _lock(self, *, atomic: bool) -> Lock:
        named = self._once.lock.named(PREFIX + self._key)
        return dataclasses.replace(named, atomic=atomic, note=self._task)

    def _find_first(self) -> Job | None:
        if self._once.every is not None:
            self._key += self._bucket(int(self._once.every * 1_000_000))
        return self._find()

    def _find(self) -> Job | None:
        return receipts.find(self._alias, self._key)

    def _bucket(self, span: int) -> str:
        connection = connections[self._alias]
        now = backend_for(connection).clock(connection)
        begins = EPOCH + (now - now % span) * MICROSECOND
        return f"{begins.strftime(BUCKET)}/{span / 1_000_000:.15g}"

    # -- what runs under the lock; see Note [Receipts] -------------------------------------------

    def _work(self, lease: Lease, joins: bool) -> Any:
        if not (self._once.atomic or joins):
            receipts.begin(self._run_of(lease))
            result = self._body()
            self._finish(lease, result)
            return result
        with transaction.atomic(using=self._alias) if joins else nullcontext():
            result = self._body()
            receipts.finish(self._run_of(lease), self._json(result), begun=False)
        return result

    def _begin_unless_done(self, lease: Lease) -> Job | None:
        found = self._find()
        if found is None:
            receipts.begin(self._run_of(lease))
        return found

    def _finish(self, lease: Lease, result: Any) -> None:
        """Write the receipt and release the lock, in one transaction."""
        text = self._json(result)
        lease.check()
        refresh(connections[self._alias], lease.held_for)
        with transaction.atomic(using=self._alias):
            receipts.finish(self._run_of(lease), text, begun=True)
            lease.release()

    def _run_of(self, lease: Lease) -> receipts.Run:
        started = lease.acquired_at
        return receipts.Run(
            self._alias, self._key, lease.token, started, self._task, self._once.keep
        )

    def _json(self, result: Any) -> str:
        try:
            return json_of(result)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"The result of once({self._key!r}) cannot be stored: {error}. Return what JSON "
                "can express, or nothing; there is no receipt, and the job will run again."
            ) from error

    def _tell_done(self) -> None:
        name, took = PREFIX + self._key, clock() - self._started
        signals.job_done.send_robust(sender=Call, name=name, took=took)

    def _answer(self, found: Job) -> Any:
        name = PREFIX + self._key
        signals.job_duplicate.send_robust(sender=Call, name=name, finished_at=found.finished_at)
        if self._once.on_duplicate != "raise":
            return found.result if self._once.on_duplicate == "return" else None
        raise JobDuplicate(
            f"The job {self._key!r} was done before, at {found.finished_at}, and did not run.",
            key=self._key,
            result=found.result,
            finished_at=found.finished_at,
        )


def _task_of(function: Any) -> str:
    """Return what a job's row and the note of its lock say about the function."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"[:LONGEST_NAME]
