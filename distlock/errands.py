"""What a task has done in a thread: nothing is lost when it is cancelled meanwhile.

Statements run where Django runs the synchronous code of a task: in one thread, whose connections
and transactions are the task's. A thread cannot be cancelled, so an errand always ends; only
nobody may want its result any more. That is found out under a mutex, by the thread or by the task,
whichever is later, and never takes the event loop, which may be about to end.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

from asgiref.sync import sync_to_async

T = TypeVar("T")


class Errand(Generic[T]):
    """A function to be run in a thread for a task.

    unwanted: called, in any thread, with a result that comes for a task that was cancelled; what it
        returns is then called in the thread of synchronous code. Such a function is not begun any
        more once the task is cancelled.
    instead: called if the function, which must run all the same, can never begin, or has not
        begun after `patience` seconds. It may still begin later.
    """

    def __init__(
        self,
        function: Callable[[], T],
        *,
        unwanted: Callable[[T], Callable[[], None] | None] | None = None,
        instead: Callable[[], None] | None = None,
        patience: float | None = None,
    ) -> None:
        self._function = function
        self._unwanted = unwanted
        self._instead = instead
        self._patience = patience
        self._mutex = threading.RLock()  # see Note [Collected]
        self._begun = self._cancelled = False
        self._results: list[T] = []

    async def run(self) -> T:
        """Return what the function returns. Cancelled, it ends at once."""
        timer = None
        if self._patience is not None:
            timer = asyncio.get_running_loop().call_later(self._patience, self._unless_begun)
        try:
            errand = asyncio.ensure_future(sync_to_async(self._run)())
            return (await asyncio.shield(errand))[0]
        except (asyncio.CancelledError, GeneratorExit) as error:
            rest = self._cancel()
            if rest is not None and not isinstance(error, GeneratorExit):  # then no loop is left
                _call_in_thread(rest)
            errand.add_done_callback(self._has_ended)
            raise
        except BaseException:
            self._unless_begun()  # the thread may have taken no more work
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _run(self) -> list[T]:
        with self._mutex:
            if self._cancelled and self._unwanted is not None:
                return []
            self._begun = True
        result = self._function()
        with self._mutex:
            self._results.append(result)
            too_late = self._cancelled
        if too_late and self._unwanted is not None:
            rest = self._unwanted(result)
            if rest is not None:
                rest()
        return self._results

    def _cancel(self) -> Callable[[], None] | None:
        with self._mutex:
            self._cancelled = True
            results = list(self._results)
        if results and self._unwanted is not None:
            return self._unwanted(results[0])
        return None

    def _has_ended(self, errand: asyncio.Future[list[T]]) -> None:
        if errand.cancelled() or errand.exception() is not None:  # nobody is left to be told
            self._unless_begun()

    def _unless_begun(self) -> None:
        with self._mutex:
            begun = self._begun
        if not begun and self._instead is not None:
            self._instead()


def _call_in_thread(function: Callable[[], None]) -> None:
    """Call a function in the thread of synchronous code, and let nobody wait for that.

    Not by a task: a loop that is about to end would cancel it, maybe before the thread begins.
    """
    call = sync_to_async(function)()
    with suppress(RuntimeError):  # the thread takes no more work
        call.send(None)  # until it would wait for the thread
    call.close()
