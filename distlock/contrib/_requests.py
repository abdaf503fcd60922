"""What a view got: which request, whose, with which key, and whether it is the same as another.

Django REST framework wraps Django's request and knows the user only behind its own `dispatch()`.
Nothing of it is imported here: its parts are known by what they have.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core.exceptions import ImproperlyConfigured
from django.http import HttpRequest
from django.http.request import RawPostDataException

from ..decorators import name_of
from ._canonical import CanonicalEncoder

FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"(?: *;[^"]*)?')
BARE = re.compile(r"[!#-+\--:<-\[\]-~]+")
LONGEST_HEADER = 255
CSRF_FIELD = "csrfmiddlewaretoken"
RIGHT_ORDER = (
    "idempotent goes under the decorators of Django REST framework, next to the function, where "
    "the user is known:\n"
    '    @api_view(["POST"])\n    @idempotent\n    def view(request): ...\n'
    "or onto the methods of a view class, never onto dispatch() or as_view():\n"
    "    class View(APIView):\n        @idempotent\n        def post(self, request): ..."
)


def checked_view(view: Any) -> Any:
    """Return what can be decorated. Raises `TypeError` or `ImproperlyConfigured`."""
    if hasattr(view, "cls"):  # what as_view() of Django REST framework and api_view() make
        raise ImproperlyConfigured(RIGHT_ORDER)
    if isinstance(view, type) or not callable(view):
        raise TypeError(
            f"idempotent decorates functions and methods, not {view!r}. For a class: "
            '@method_decorator(idempotent, name="post").'
        )
    return view


def request_in(view: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Return the request of a call: of a function, a method, or one that Django has bound.

    Raises `ImproperlyConfigured` where Django REST framework has not seen it yet.
    """
    for before, request in enumerate(args[:2]):
        if isinstance(_plain(request), HttpRequest):
            bound = getattr(getattr(view, "func", view), "__self__", None)
            if hasattr(args[0] if before else bound, "initialize_request") and (
                _plain(request) is request
            ):
                raise ImproperlyConfigured(RIGHT_ORDER)
            return request
    raise TypeError(f"{name_of(view)} was called without a request: idempotent is for views.")


def key_in(header: str) -> str:
    """Return the key in a header, or "": a string of RFC 9651, or one without the quotes."""
    if quoted := QUOTED.fullmatch(header.strip()):
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    else:
        key = header if BARE.fullmatch(header) else ""
    return key if len(key) <= LONGEST_HEADER else ""


def asker(request: Any, anonymous: str | Callable[[Any], str]) -> str:
    """Return whose key it is, or "" if nobody can be told: only they get the response again."""
    user: Any = getattr(request, "user", None)
    # Users without a key of their own, of some tokens for instance, would all be one.
    if getattr(user, "is_authenticated", False) and getattr(user, "pk", None) is not None:
        return f"user:{getattr(user, '_meta', user.__class__.__qualname__)}:{user.pk}"
    if callable(anonymous):
        own = told_by(anonymous, request, "anonymous")
        return f"own:{own}" if own else ""
    session = getattr(request, "session", None)
    if anonymous == "session" and isinstance(session, SignedCookies):
        raise ImproperlyConfigured(
            'idempotent(anonymous="session") needs sessions with a key that stays: that of '
            "signed_cookies changes with each save. Use another SESSION_ENGINE, or a callable."
        )
    # Asked for its keys it is loaded, and a session that there is not has no key any more.
    if anonymous == "session" and session and session.keys() and session.session_key:
        return f"session:{_digest(session.session_key.encode())}"  # the key itself is a secret
    return ""


def told_by(function: Callable[[Any], Any], request: Any, argument: str) -> str:
    """Return what one of the user's callables says of a request."""
    own = function(request)
    if not isinstance(own, str | int):
        # What an object looks like may be the same for two clients.
        raise TypeError(f"{argument} must return a str, not {own!r}.")
    return str(own or "")


def fingerprint(request: Any) -> str:
    """Return a digest of what the client asks for. Reads the body, and leaves it to the view."""
    plain = _plain(request)
    of_type = [plain.content_type, sorted((plain.content_params or {}).items())]
    if plain.content_type in FORMS and (plain is not request or plain.method == "POST"):
        # The boundary differs each time, and Django may have parsed it: there is no body then.
        of_type, payload = [plain.content_type], _fields(request)
    else:
        payload = _body(request)
    what = [plain.method, plain.path, plain.META.get("QUERY_STRING", ""), of_type, payload]
    return _digest(json.dumps(what, cls=CanonicalEncoder, sort_keys=True).encode())


def _plain(request: Any) -> Any:
    """Return Django's request, which the one of Django REST framework wraps."""
    return getattr(request, "_request", request)


def _body(request: Any) -> Any:
    try:
        return _digest(_plain(request).body)
    except RawPostDataException:  # a permission or a throttle has read the data before the view
        if _plain(request) is request:
            raise
        return request.data


def _fields(request: Any) -> Any:
    values = [pair for pair in sorted(request.POST.lists()) if pair[0] != CSRF_FIELD]
    files = [
        (field, file.name, file.content_type, _digest_of(file))
        for field, several in sorted(request.FILES.lists())
        for file in several
    ]
    return [values, files]


def _digest_of(file: Any) -> str:
    digest = hashlib.sha256()
    for chunk in file.chunks():
        digest.update(chunk)
    file.seek(0)
    return digest.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
