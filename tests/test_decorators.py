from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from django.db import connection

from distlock import AlreadyHeld, LockBusy, LockLost, lock
from distlock.models import DistributedLock
from tests.app.models import Counter
from tests.support import in_thread, is_free, steal

pytestmark = pytest.mark.django_db(transaction=True)


def held() -> list[str]:
    """The names that are held now."""
    names = DistributedLock.objects.exclude(owner="").values_list("name", flat=True)
    return sorted(names)


# -- the wrapped function ------------------------------------------------------------------------


def test_the_lock_is_held_while_the_function_runs_and_no_longer() -> None:
    @lock("x")
    def work() -> list[str]:
        assert not is_free("x")
        return held()

    assert work() == ["x"]
    assert work() == ["x"]
    assert held() == []


def test_arguments_and_result_go_through() -> None:
    @lock("x")
    def work(a: int, /, b: int, *rest: int, c: int = 3, **more: int) -> Any:
        return a, b, rest, c, more

    assert work(1, 2, 9, c=4, d=5) == (1, 2, (9,), 4, {"d": 5})


def test_the_function_keeps_its_name_its_text_and_its_signature() -> None:
    def work(a: int, b: str = "x") -> bool:
        """What it does."""
        return True

    wrapped = lock("x")(work)
    assert (wrapped.__name__, wrapped.__doc__) == ("work", "What it does.")
    assert inspect.signature(wrapped) == inspect.signature(work)
    assert wrapped.__wrapped__ is work  # type: ignore[attr-defined]


def test_wrong_arguments_are_the_type_error_that_they_always_were() -> None:
    @lock("order:{number}")
    def by_number(number: int) -> None: ...

    @lock("x")
    def constant(number: int) -> None: ...

    for function in (by_number, constant):
        with pytest.raises(TypeError, match="number"):
            function()  # type: ignore[call-arg]
        with pytest.raises(TypeError, match=r"too many positional|takes 1 positional"):
            function(1, 2)  # type: ignore[call-arg]
    assert held() == []


def test_an_exception_goes_through_and_frees_the_lock() -> None:
    @lock("x")
    def work() -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        work()
    assert is_free("x")


def test_a_method_and_a_static_method_can_be_decorated() -> None:
    class Shop:
        name = "corner"

        @lock("shop:{self.name}:{item}")
        def sell(self, item: str) -> list[str]:
            return held()

        @staticmethod
        @lock("static:{item}")
        def price(item: str) -> list[str]:
            return held()

        @classmethod
        @lock("class:{cls.__name__}")
        def count(cls) -> list[str]:
            return held()

    assert Shop().sell("tea") == ["shop:corner:tea"]
    assert Shop.price("tea") == ["static:tea"]
    assert Shop.count() == ["class:Shop"]


def test_a_partial_and_an_object_with_a_call_can_be_decorated() -> None:
    class Work:
        def __call__(self, number: int) -> list[str]:
            return held()

    def add(a: int, b: int) -> list[str]:
        return held()

    assert lock("n:{number}")(Work())(5) == ["n:5"]
    assert lock("b:{b}")(functools.partial(add, 1))(2) == ["b:2"]


def test_decorators_can_be_stacked() -> None:
    @lock("outer")
    @lock("inner:{number}")
    def work(number: int) -> list[str]:
        return held()

    assert work(1) == ["inner:1", "outer"]


def test_a_function_that_calls_itself_under_its_own_lock_is_told_so() -> None:
    @lock("x")
    def work(again: bool) -> None:
        if again:
            work(False)

    with pytest.raises(AlreadyHeld, match="reentrant=True"):
        work(True)
    assert is_free("x")


def test_a_reentrant_function_may_call_itself() -> None:
    @lock("x", reentrant=True)
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n > 1 else 1

    assert factorial(5) == 120
    assert is_free("x")


def test_one_decorator_serves_many_functions_and_threads() -> None:
    guarded = lock("n:{number}")
    running = threading.Barrier(4, timeout=20)

    @guarded
    def one(number: int) -> int:
        running.wait()  # all four are inside at once: their names differ
        return number

    @guarded
    def two(number: int) -> int:
        return -number

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(in_thread, partial(one, number)) for number in range(4)]
        assert [future.result(20) for future in futures] == [0, 1, 2, 3]
    assert two(7) == -7


def test_a_lease_that_was_lost_is_told_after_the_function() -> None:
    @lock("x", renew=False, ttl=60)
    def work() -> str:
        steal("x")
        return "done"

    with pytest.raises(LockLost):
        work()


def test_an_atomic_function_commits_with_its_lock() -> None:
    @lock("x", atomic=True)
    def work(fail: bool) -> None:
        assert connection.in_atomic_block
        Counter.objects.create(name=str(fail))
        if fail:
            1 / 0

    work(False)
    with pytest.raises(ZeroDivisionError):
        work(True)
    assert [counter.name for counter in Counter.objects.all()] == ["False"]
    assert is_free("x")


# -- on_busy -------------------------------------------------------------------------------------


def test_a_call_that_meets_a_busy_lock_raises() -> None:
    @lock("x", wait=0)
    def work() -> str:
        return "done"

    with lock("x"):
        with pytest.raises(LockBusy):
            in_thread(work)
    assert work() == "done"


def test_a_call_that_may_be_skipped_is_skipped() -> None:
    called = []

    @lock("x", wait=0, on_busy="skip")
    def work() -> str:
        called.append(1)
        return "done"

    with lock("x"):
        assert in_thread(work) is None
    assert called == []
    assert work() == "done"


def test_a_busy_lock_inside_the_function_is_not_skipped() -> None:
    @lock("x", wait=0, on_busy="skip")
    def work() -> str:
        def inner() -> None:
            lock("y", wait=0).acquire()

        with lock("y"):
            in_thread(inner)
        return "done"

    with pytest.raises(LockBusy) as caught:
        work()
    assert caught.value.name == "y"


# -- names from arguments ------------------------------------------------------------------------


def test_a_template_takes_the_arguments_of_the_call() -> None:
    @lock("stock:{product}:{size}")
    def work(product: int, size: str = "L") -> list[str]:
        return held()

    assert work(7) == ["stock:7:L"]
    assert work(7, "S") == ["stock:7:S"]
    assert work(size="M", product=8) == ["stock:8:M"]


def test_a_template_may_format_and_look_into_an_argument() -> None:
    @lock("{order.pk:05d}/{rows[0]}/{text!r}")
    def work(order: Counter, rows: list[int], text: str) -> list[str]:
        return held()

    assert work(Counter(pk=42), [3], "a b") == ["00042/3/'a b'"]


def test_a_template_may_take_all_the_rest() -> None:
    @lock("{args}{kwargs}")
    def work(*args: int, **kwargs: int) -> list[str]:
        return held()

    assert work(1, 2, a=3) == ["(1, 2){'a': 3}"]


def test_a_brace_is_written_twice_in_a_decorator_and_once_elsewhere() -> None:
    @lock("{{json}}")
    def work() -> list[str]:
        return held()

    assert work() == ["{json}"]
    with lock("{json}"):
        assert held() == ["{json}"]


def test_what_an_argument_holds_is_not_taken_for_a_template() -> None:
    @lock("x:{name}")
    def work(name: str) -> list[str]:
        return held()

    assert work("{other}") == ["x:{other}"]


def test_a_callable_gets_the_bound_arguments_with_their_defaults() -> None:
    seen: list[Mapping[str, Any]] = []

    def name(arguments: Mapping[str, Any]) -> str:
        seen.append(dict(arguments))
        return "n:" + str(arguments["b"])

    @lock(name)
    def work(a: int, b: int = 2, *rest: int, **more: int) -> list[str]:
        return held()

    assert work(1, c=3) == ["n:2"]
    assert seen == [{"a": 1, "b": 2, "rest": (), "more": {"c": 3}}]


def test_an_error_in_a_callable_name_is_the_callers() -> None:
    @lock(lambda arguments: arguments["absent"])
    def work() -> None: ...

    with pytest.raises(KeyError, match="absent"):
        work()


# -- what cannot be decorated --------------------------------------------------------------------


def generator() -> Iterator[int]:
    yield 1


async def coroutine() -> None: ...


async def async_generator() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("function", [generator, async_generator, functools.partial(generator)])
def test_a_generator_is_refused(function: Any) -> None:
    with pytest.raises(TypeError, match=r"generator.*released before its body runs.*with block"):
        lock("x")(function)


@pytest.mark.parametrize("what", [5, "name", None, dict, Counter, [generator]], ids=repr)
def test_what_is_no_function_is_refused(what: Any) -> None:
    with pytest.raises(TypeError, match=r"lock\(\) decorates functions, not "):
        lock("x")(what)
