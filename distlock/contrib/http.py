"""HTTP: a request that is sent twice is processed once, known by its `Idempotency-Key`.

    @idempotent
    def pay(request): ...

    class Payments(APIView):
        @idempotent
        def post(self, request): ...

The header and the errors are those of draft-ietf-httpapi-idempotency-key-header. It is `once()`:
the stored result is the response, and who finds the lock busy gets a 409.

# Note [Final answers]
A response is stored if it is what became of the request: below 500, and not one of those that ask
the client to try again. With `atomic=True` (and in `ATOMIC_REQUESTS`) what is not stored is undone
as well, by a rollback to where the view began: a 503, a view that raises, `set_rollback(True)`. So
the work and the stored answer are there together, or neither is, and a retry may run the view.
A streaming response can be neither stored nor taken back: it is an error.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from asgiref.sync import sync_to_async
from django.db import connections
from django.http import HttpResponse
from django.http.response import HttpResponseBase

from ..arguments import DEFAULT, Default, flag_of
from ..deadlines import Seconds
from ..decorators import is_async, name_of
from ..exceptions import LockBusy
from ..jobs import LONGEST_KEY, Once, once
from ._canonical import fitting
from ._requests import LONGEST_HEADER, asker, checked_view, fingerprint, key_in, request_in, told_by
from ._responses import kept, problem, render, replayed

Anonymous = Literal["refuse", "session"] | Callable[[Any], str]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS", "TRACE")
TRY_AGAIN = (401, 408, 425, 429)


def is_final(response: HttpResponseBase) -> bool:
    """Whether a response is what became of a request; see Note [Final answers]."""
    return response.status_code < 500 and response.status_code not in TRY_AGAIN


def idempotent(
    view: Any = None,
    /,
    *,
    required: bool = True,
    keep: Seconds = 86400,
    atomic: bool = True,
    anonymous: Anonymous = "refuse",
    tenant: Callable[[Any], str] | None = None,
    final: Callable[[Any], bool] = is_final,
    docs: str = "",
    ttl: Seconds | Default = DEFAULT,
    using: str | None = None,
) -> Any:
    """Process a request once per user and `Idempotency-Key`, and replay the response.

    For function views, async ones included, and methods of view classes; with Django REST
    framework next to the function, under `@api_view` and on `post()`. GET and HEAD pass through.

    required: whether a request without the header is a 400; else it just runs.
    keep: how long the response is kept, in seconds or as a `timedelta`.
    atomic: run the view in a transaction that commits together with the stored response. It must
        be `False` for async views: then they run at least once. `ATOMIC_REQUESTS` is joined.
    anonymous: "refuse" those who are not logged in (403); "session" keeps their responses per
        session, and refuses who has none yet; or a callable that gets the request and returns who
        asks, for views with logins of their own: never "" (refused) or the same for two clients.
    tenant: a callable that gets the request and returns whose users it is from, where the same
        user id means different people and they share one table of jobs.
    final: whether to store a response; see Note [Final answers].
    docs: a link to your documentation, for the error responses.
    ttl, using: as in `once()`.

    Raises `ImproperlyConfigured` above the decorators of Django REST framework, `TypeError` for an
    async view without `atomic=False`, and what `once()` raises.
    """
    if not (callable(anonymous) or anonymous in ("refuse", "session")):
        raise ValueError(f'anonymous must be "refuse", "session" or callable, not {anonymous!r}.')
    if not callable(final):
        raise TypeError(f"final must be a callable that gets the response, not {final!r}.")
    if not (tenant is None or callable(tenant)):
        raise TypeError(f"tenant must be a callable that gets the request, not {tenant!r}.")
    for argument, given in (("anonymous", anonymous), ("tenant", tenant), ("final", final)):
        if is_async(given):
            raise TypeError(f"{argument} must be a plain function, also for an async view.")
    job = once("http", keep=keep, atomic=atomic, wait=0, ttl=ttl, using=using)
    rule = _Rule(job, flag_of(required, "required") or False, anonymous, tenant, final, docs)
    return partial(_decorate, rule) if view is None else _decorate(rule, view)


@dataclasses.dataclass(frozen=True)
class _Rule:
    """What one view asks for."""

    job: Once
    required: bool
    anonymous: Anonymous
    tenant: Callable[[Any], str] | None
    final: Callable[[Any], bool]
    docs: str


def _decorate(rule: _Rule, view: Any) -> Any:
    if is_async(checked_view(view)):
        if rule.job.atomic:
            raise TypeError(
                f"{name_of(view)} is async, and Django has no transactions across an await. "
                "Pass atomic=False, and it runs at least once."
            )

        @functools.wraps(view)
        async def aprocessed_once(*args: Any, **kwargs: Any) -> Any:
            exchange = _Exchange(rule, view, request_in(view, args), partial(view, *args, **kwargs))
            if exchange.passes:
                return await exchange.call()
            with exchange.answering():
                job = await sync_to_async(exchange.job)()
                exchange.settle(await job.arun(exchange.named(exchange.aprocess)))
            return exchange.response

        return aprocessed_once

    @functools.wraps(view)
    def processed_once(*args: Any, **kwargs: Any) -> Any:
        exchange = _Exchange(rule, view, request_in(view, args), partial(view, *args, **kwargs))
        if exchange.passes:
            return exchange.call()
        with exchange.answering():
            exchange.settle(exchange.job().run(exchange.named(exchange.process)))
        return exchange.response

    return processed_once


class _Answered(Exception):
    """Ends an exchange whose response is there already, and leaves no receipt of it."""


class _Exchange:
    """One request and its response."""

    def __init__(self, rule: _Rule, view: Any, request: Any, call: Callable[[], Any]) -> None:
        self.call = call
        self.response: Any = None
        self._rule = rule
        self._view = view
        self._request = request
        self._header = request.headers.get("Idempotency-Key")
        self._fingerprint = ""
        self._ran = self._undo = False

    @property
    def passes(self) -> bool:
        """Whether the view is to answer alone."""
        without = self._header is None and not self._rule.required
        return without or self._request.method in SAFE_METHODS

    def job(self) -> Once:
        """Return the job that this request is. Raises `_Answered` if it cannot be one."""
        if self._header is None:
            raise self._refused(400, "Idempotency-Key is missing", "This operation requires one.")
        if not (key := key_in(self._header)):
            detail = f'It must be a string of 1 to {LONGEST_HEADER} characters, such as "a-uuid".'
            raise self._refused(400, "Idempotency-Key is malformed", detail)
        if not (who := asker(self._request, self._rule.anonymous)):
            detail = "A key counts for a user or a session, and the request has none."
            raise self._refused(403, "Idempotency-Key cannot be kept", detail)
        if self._rule.tenant is not None:
            who = f"{quote(told_by(self._rule.tenant, self._request, 'tenant'))}/{who}"
        self._fingerprint = fingerprint(self._request)
        # Quoted: no key can look like somebody else's, or like the template of a key.
        name = f"http:{quote(who, safe=':')}:{quote(key)}"
        return dataclasses.replace(self._rule.job, key=fitting(name, LONGEST_KEY))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """See that there is a response when the block has ended."""
        try:
            yield
        except LockBusy:
            if self._ran:  # the view's own
                raise
            detail = "The same request is being processed. Try again, with the same key."
            self._refused(409, "A request is outstanding for this Idempotency-Key", detail)
            self.response["Retry-After"] = "1"
        except _Answered:
            if self._undo and self._connection.in_atomic_block:
                # Only what the view did is undone so far; it was said of the whole transaction.
                self._connection.set_rollback(True)

    def settle(self, found: dict[str, Any]) -> None:
        """Answer a duplicate; a request that was processed has its response."""
        if self._ran:
            return
        if found["request"] != self._fingerprint:
            detail = "It was sent before, with another request. A new request needs a new key."
            raise self._refused(422, "Idempotency-Key is already used", detail)
        self.response = replayed(found)

    def _refused(self, status: int, title: str, detail: str) -> _Answered:
        self.response = problem(status, title, detail, self._rule.docs)
        return _Answered()

    # -- what runs under the lock of the key ----------------------------------------------------

    def named(self, process: Any) -> Any:
        """Return a body that is called what the view is, for the admin."""
        return functools.update_wrapper(partial(process), self._view, updated=())

    def process(self) -> dict[str, Any]:
        """Call the view and return what to store. Raises `_Answered` if that is nothing."""
        self._ran = True
        self.response = self.call()
        if self._connection.in_atomic_block and self._connection.needs_rollback:
            self._undo = True
            raise _Answered
        return self._stored()

    async def aprocess(self) -> dict[str, Any]:
        """Call the view and return what to store; see `process`."""
        self._ran = True
        self.response = await self.call()
        return await sync_to_async(self._stored)()  # it may render a template

    @property
    def _connection(self) -> Any:
        return connections[self._rule.job.lock.alias]

    def _stored(self) -> dict[str, Any]:
        if not isinstance(self.response, HttpResponseBase):
            hint = " Make the view async def." if inspect.isawaitable(self.response) else ""
            raise TypeError(f"{name_of(self._view)} returned {self.response!r}, no response.{hint}")
        render(self.response, self._request)
        if not self._rule.final(self.response):
            raise _Answered
        if not isinstance(self.response, HttpResponse):
            raise TypeError(
                f"{name_of(self._view)} returned a streaming response, which cannot be stored and "
                "replayed: return its content, or a link to it, or do not use idempotent."
            )
        return {"request": self._fingerprint, **kept(self.response)}
