"""`idempotent`: one effect per key and user, and the same response for whoever asks again."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.backends.db import SessionStore
from django.contrib.sessions.backends.signed_cookies import SessionStore as SignedCookies
from django.core.exceptions import ImproperlyConfigured
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import connections
from django.http import HttpRequest, HttpResponse
from django.middleware.csrf import get_token
from django.test import AsyncClient, Client, RequestFactory
from django.views import View

from distlock import LockBusy
from distlock.contrib.http import idempotent
from distlock.models import Job
from tests.app.models import Counter
from tests.contrib import http_views as views
from tests.support import in_thread
from tests.test_async import run

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.urls("tests.contrib.http_views"),
]
servers = pytest.mark.vendor("postgresql", "mysql")  # SQLite has one writer at a time


@pytest.fixture
def ada() -> User:
    return User.objects.create_user("ada", password="x")


@pytest.fixture
def bob() -> User:
    return User.objects.create_user("bob", password="x")


@pytest.fixture
def client(ada: User) -> Client:
    return logged_in(ada)


@pytest.fixture(params=[False, True], ids=["", "ATOMIC_REQUESTS"])
def atomic_requests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Every request in a transaction, or not."""
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", request.param)
    return bool(request.param)


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """The first call of a view says that it has begun, and waits until it may go on."""
    events = SimpleNamespace(begun=threading.Event(), go_on=threading.Event())

    def wait() -> None:
        if not events.begun.is_set():
            events.begun.set()
            assert events.go_on.wait(20)

    monkeypatch.setattr(views, "during", wait)
    yield events
    events.go_on.set()


def logged_in(user: User) -> Client:
    client = Client(raise_request_exception=False)
    client.force_login(user)
    return client


def post(client: Client, url: str, data: Any = '{"amount": 1}', key: str = "k", **how: Any) -> Any:
    how.setdefault("content_type", "application/json")
    return client.post(url, data, headers={"Idempotency-Key": key, **how.pop("headers", {})}, **how)


def effects() -> int:
    return Counter.objects.count()


def problem(response: Any) -> tuple[int, str]:
    """The status and the title of an error."""
    told = response.json()
    assert response["Content-Type"] == "application/problem+json"
    assert told["status"] == response.status_code
    assert told["detail"]
    return response.status_code, told["title"]


def replays(response: Any) -> bool:
    return response.get("Idempotency-Replayed") == "true"


# -- the same request again -----------------------------------------------------------------------


def test_a_request_again_gets_the_same_response(client: Client, atomic_requests: bool) -> None:
    first, second = post(client, "/pay"), post(client, "/pay")
    assert (first.status_code, first.json(), effects()) == (201, {"n": 1}, 1)
    assert (second.status_code, second.content) == (201, first.content)
    assert dict(second.items()) == {**dict(first.items()), "Idempotency-Replayed": "true"}
    assert not replays(first)
    assert post(client, "/pay", key="another").json() == {"n": 2}


def test_bytes_are_replayed_to_the_letter_and_cookies_never(client: Client) -> None:
    first, second = post(client, "/image"), post(client, "/image")
    assert first.cookies["secret"].value == "of the first"
    assert second.content == first.content == b"\x89PNG\xff1"
    assert second["Content-Type"] == "image/png"
    assert replays(second)
    assert not second.cookies
    assert "Set-Cookie" not in second
    assert "secret" not in json.dumps(Job.objects.get().result)


@pytest.mark.parametrize("charset", ["utf-8", "utf-16-le", "iso-8859-1", "unknown"])
def test_bytes_are_replayed_whatever_charset_they_are_said_to_be(
    client: Client, charset: str
) -> None:
    for again in (False, True):
        response = post(client, f"/text/{charset}")
        assert response.content == b"\xc3\xa9\x00"
        assert response["Content-Type"] == f"text/plain; charset={charset}"
        assert replays(response) is again


def test_the_row_of_the_job(client: Client, ada: User) -> None:
    post(client, "/on_name", key="8e03978e-40d5")
    job = Job.objects.get()
    assert job.key == f"http:user:auth.user:{ada.pk}:8e03978e-40d5"
    assert job.task == "tests.contrib.http_views.Undecorated.post"
    assert job.expires_at - job.finished_at == timedelta(seconds=60)
    Job.objects.update(expires_at=job.finished_at - timedelta(days=1))
    assert not replays(post(client, "/on_name", key="8e03978e-40d5"))
    assert effects() == 2


def test_a_template_is_rendered_before_it_is_stored(client: Client) -> None:
    assert [post(client, "/template").content for _ in range(2)] == [b"<p>1</p>"] * 2


def test_methods_and_classes(client: Client) -> None:
    for number, url in enumerate(("/on_method", "/on_name", "/on_dispatch", "/as_view"), 1):
        answers = [post(client, url, key=url) for _ in range(2)]
        assert [answer.json() for answer in answers] == [{"n": number}] * 2
        assert replays(answers[1])
        assert problem(client.post(url))[0] == 400


# -- another request, another key, no key ---------------------------------------------------------


OTHERS: list[dict[str, str]] = [
    {"data": '{"amount": 2}'},
    {"url": "/pay/elsewhere"},
    {"url": "/pay?twice"},
    {"content_type": "text/json"},
    {"content_type": "application/json; charset=latin-1"},
]


def test_a_key_with_another_request_is_refused(client: Client) -> None:
    post(client, "/pay")
    for other in OTHERS:
        refused = post(client, **{"url": "/pay", **other})
        assert problem(refused) == (422, "Idempotency-Key is already used"), other
    assert refused.json()["type"] == "https://example.com/keys"
    assert refused["Link"] == '<https://example.com/keys>; rel="describedby"; type="text/html"'
    assert replays(post(client, "/pay"))
    assert effects() == 1


def test_another_method_is_another_request(client: Client) -> None:
    post(client, "/pay")
    headers = {"Idempotency-Key": "k"}
    other = client.put("/pay", '{"amount": 1}', "application/json", headers=headers)
    assert problem(other)[0] == 422


def test_without_a_key(client: Client) -> None:
    assert problem(client.post("/pay")) == (400, "Idempotency-Key is missing")
    assert effects() == 0
    assert [client.post("/optional").json() for _ in range(2)] == [{"n": 1}, {"n": 2}]
    assert replays((post(client, "/optional"), post(client, "/optional"))[1])


def test_safe_methods_pass_through(client: Client) -> None:
    for method in ("get", "get", "head", "options"):
        answer = getattr(client, method)("/on_dispatch", headers={"Idempotency-Key": "k"})
        assert answer.status_code == 200
    assert Job.objects.count() == 0


def test_what_is_no_key(client: Client) -> None:
    wrong = ["", '""', '"open', "two words", "a,b", 'a"b', r'"a\b"', "ä", "x" * 256, '"x"y', "a;b"]
    for key in wrong:
        assert problem(post(client, "/pay", key=key)) == (400, "Idempotency-Key is malformed"), key
    assert effects() == 0


def test_spellings_of_a_key(client: Client) -> None:
    long = "x" * 255
    same = [("a-1", '"a-1"'), (r'"\\a\""', r'"\\a\"" '), ("x", '"x";q=1'), (long, f'"{long}"')]
    for one, other in same:
        assert post(client, "/pay", key=one).status_code == 201
        assert replays(post(client, "/pay", key=other)), one
    assert Job.objects.filter(key__endswith=r":%5Ca%22").exists()


def test_a_key_is_taken_to_the_letter(client: Client) -> None:
    keys = [
        "{request}",
        "%7Brequest%7D",
        "a:b",
        "a%3Ab",
        "K",
        "k",
        "%6B",
        "a b",
        "a+b",
        "{}",
        r"\\",
    ]
    for number, key in enumerate(keys, 1):
        assert post(client, "/pay", key=f'"{key}"').json() == {"n": number}


# -- whose key ------------------------------------------------------------------------------------


def test_a_key_is_one_users(client: Client, bob: User) -> None:
    assert post(client, "/pay").json() == {"n": 1}
    other = post(logged_in(bob), "/pay")
    assert (other.json(), replays(other)) == ({"n": 2}, False)
    assert problem(post(Client(), "/pay")) == (403, "Idempotency-Key cannot be kept")
    assert replays(post(client, "/pay"))


def test_anonymous_sessions(client: Client) -> None:
    def anonymous() -> Client:
        client = Client()
        session = client.session
        session["basket"] = 1
        session.save()
        return client

    one, two, none, made_up = anonymous(), anonymous(), Client(), Client()
    made_up.cookies["sessionid"] = "made-up-and-long-enough-to-be-taken"
    assert [post(visitor, "/for_sessions").json()["n"] for visitor in (one, two, client)] == [
        *(1, 2, 3)
    ]
    assert replays(post(one, "/for_sessions"))
    for visitor in (none, made_up):
        assert problem(post(visitor, "/for_sessions"))[0] == 403
    assert not Job.objects.filter(key__contains=one.session.session_key).exists()
    untouched = RequestFactory().post("/", headers={"Idempotency-Key": "k"})
    untouched.session = SessionStore("made-up-and-long-enough-to-be-taken")
    assert problem_of(views.for_sessions(untouched)) == 403


def test_logins_of_their_own(client: Client, ada: User) -> None:
    def ask(key: str) -> Any:
        return post(Client(), "/for_machines", headers={"Api-Key": key})

    assert [ask(key).json()["n"] for key in ("one", "two")] == [1, 2]
    assert replays(ask("one"))
    assert problem(ask(""))[0] == 403
    assert post(client, "/for_machines").json() == {"n": 3}
    assert not replays(ask(f"user:auth.user:{ada.pk}"))


def test_a_login_of_ones_own_is_a_text() -> None:
    """What an object looks like may be what another client's looks like."""
    request = RequestFactory().post("/pay", headers={"Idempotency-Key": "k"})
    view: Callable[..., Any] = idempotent(views.pay.__wrapped__, anonymous=lambda request: object())
    with pytest.raises(TypeError, match="anonymous must return a str"):
        view(request)


def test_sessions_without_a_key_that_stays_are_refused() -> None:
    request = RequestFactory().post("/pay", headers={"Idempotency-Key": "k"})
    request.session = SignedCookies()
    request.session["basket"] = 1
    view = idempotent(lambda request: HttpResponse(), anonymous="session")
    with pytest.raises(ImproperlyConfigured, match="signed_cookies changes with each save"):
        view(request)


def test_a_user_of_another_tenant_is_another(ada: User) -> None:
    def ask(tenant: Any) -> Any:
        request = RequestFactory().post("/pay", headers={"Idempotency-Key": "k"})
        request.user = ada
        return idempotent(view, tenant=lambda request: tenant)(request)

    def view(request: Any) -> HttpResponse:
        return HttpResponse(str(views.work()))

    answers = [ask("a"), ask("b"), ask("a"), ask(""), ask("own:a")]
    assert [replays(answer) for answer in answers] == [False, False, True, False, False]
    with pytest.raises(TypeError, match="tenant must return a str, not None"):
        ask(None)
    with pytest.raises(TypeError, match="tenant must be a callable"):
        idempotent(tenant="a")


def test_who_has_no_key_or_is_no_user_model() -> None:
    """Two of them must not be taken for one."""

    def ask(pk: Any, cls: str = "Device") -> Any:
        request = RequestFactory().post("/pay", headers={"Idempotency-Key": "k"})
        request.user = type(cls, (), {"is_authenticated": True, "pk": pk})()
        return views.pay(request)

    assert problem_of(ask(None)) == 403
    assert [replays(ask(pk)) for pk in ("1", "1:k", 1)] == [False, False, True]
    assert not replays(ask(1, "Another"))


def problem_of(response: HttpResponse) -> int:
    return int(json.loads(response.content)["status"])


def test_a_long_name_is_hashed(client: Client) -> None:
    for end in "ab":
        assert not replays(post(client, "/pay", key="x" * 254 + end))
    assert effects() == 2
    assert max(len(job.key) for job in Job.objects.all()) == 250


# -- what is stored -------------------------------------------------------------------------------


def test_final_answers_are_stored(client: Client) -> None:
    for status in (200, 204, 302, 400, 403, 404, 409, 422):
        answers = [post(client, f"/answers/{status}", key=str(status)) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [status] * 2
        assert [replays(answer) for answer in answers] == [False, True]
    assert effects() == 8


def test_others_are_not_stored_and_undone(client: Client, atomic_requests: bool) -> None:
    for status in (401, 408, 425, 429, 500, 503) * 2:
        answer = post(client, f"/answers/{status}", key=str(status))
        assert (answer.status_code, answer.json(), effects()) == (status, {"n": 1}, 0)
    assert Job.objects.count() == 0


def test_without_atomic_what_is_not_stored_stays(client: Client) -> None:
    assert [post(client, "/loose/503").json()["n"] for _ in range(2)] == [1, 2]
    assert [post(client, "/loose/200").json()["n"] for _ in range(2)] == [3, 3]
    assert effects() == 3


def test_a_rule_of_ones_own(client: Client) -> None:
    assert [replays(post(client, "/own_rule/404")) for _ in range(2)] == [False, False]
    assert [replays(post(client, "/own_rule/500", key="b")) for _ in range(2)] == [False, True]


def test_a_view_that_raises_leaves_nothing(
    client: Client, atomic_requests: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(views, "during", lambda: 1 / 0)
        assert post(client, "/pay").status_code == 500
    assert (effects(), Job.objects.count()) == (0, 0)
    assert post(client, "/pay").json() == {"n": 1}


def test_set_rollback_leaves_nothing(client: Client, atomic_requests: bool) -> None:
    for _ in range(2):
        answer = post(client, "/rolled_back")
        assert (answer.status_code, answer.json(), effects()) == (200, {"n": 1}, 0)
    assert Job.objects.count() == 0


def test_set_rollback_is_of_the_whole_request(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(connections.settings["default"], "ATOMIC_REQUESTS", True)
    assert post(client, "/work_and_rolled_back").json() == {"n": 2}
    assert effects() == 0


def test_a_stream_is_an_error(client: Client) -> None:
    client.raise_request_exception = True
    with pytest.raises(TypeError, match="streamed returned a streaming response"):
        post(client, "/streamed")
    with pytest.raises(TypeError, match="nothing returned None"):
        post(client, "/nothing")
    assert (effects(), Job.objects.count()) == (0, 0)


# -- at the same time -----------------------------------------------------------------------------


@servers
@pytest.mark.parametrize("url", ["/pay", "/loose/200", "/rest_set"])
def test_of_two_at_a_time_one_is_told_to_wait(
    ada: User, url: str, atomic_requests: bool, pause: SimpleNamespace
) -> None:
    basic = {"Authorization": "Basic " + base64.b64encode(b"ada:x").decode()}

    def ask() -> Any:
        return post(logged_in(ada), url, headers=basic)

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(in_thread, ask)
        assert pause.begun.wait(10)
        second = in_thread(ask)
        assert problem(second) == (409, "A request is outstanding for this Idempotency-Key")
        assert second["Retry-After"] == "1"
        assert not first.done()
        pause.go_on.set()
        assert first.result(10).json()["n"] == 1
    assert replays(ask())
    assert effects() == 1


@servers
def test_a_busy_lock_of_the_view_is_its_own_affair(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy() -> None:
        raise LockBusy("x", name="x", holder=None, waited=0.0)

    monkeypatch.setattr(views, "during", busy)
    assert post(client, "/pay").status_code == 500


# -- forms ----------------------------------------------------------------------------------------


def test_a_form_with_files_is_known_whatever_its_boundary(ada: User) -> None:
    """Django reads such a body for its CSRF check, and it is gone then."""
    client = Client(enforce_csrf_checks=True)
    client.force_login(ada)
    client.cookies["csrftoken"] = secret = "a" * 32
    page = RequestFactory().get("/")
    page.META["CSRF_COOKIE"] = secret

    def send(boundary: str, name: str = "1", file: bytes = b"x") -> Any:
        parts = [
            *('name="csrfmiddlewaretoken"\r\n', get_token(page)),
            *('name="name"\r\n', name),
            *('name="file"; filename="f"\r\nContent-Type: text/plain\r\n', file.decode()),
        ]
        lines = [
            f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n{body}\r\n"
            for head, body in zip(parts[::2], parts[1::2], strict=True)
        ]
        body = "".join(lines) + f"--{boundary}--\r\n"
        how = f"multipart/form-data; boundary={boundary}"
        return post(client, "/with_csrf", body, content_type=how)

    assert send("one").json() == {"n": 1, "files": ["x"]}
    assert replays(send("two"))
    assert problem(send("one", name="2"))[0] == 422
    assert problem(send("one", file=b"y"))[0] == 422


def test_a_form_that_is_put_is_told_from_another(client: Client) -> None:
    """Django parses only those that are posted."""

    def put(file: str) -> Any:
        body = f"--b\r\nContent-Disposition: form-data; name=x\r\n\r\n{file}\r\n--b--\r\n"
        how = {"content_type": "multipart/form-data; boundary=b"}
        return client.put("/pay", body, headers={"Idempotency-Key": "k"}, **how)

    assert put("1").status_code == 201
    assert replays(put("1"))
    assert problem(put("2"))[0] == 422


# -- coroutines -----------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["/in_coroutine", "/on_coroutine"])
def test_async_views(ada: User, url: str) -> None:
    async def main() -> None:
        client = AsyncClient()
        await client.aforce_login(ada)

        async def ask(data: str = "1", key: str = "k") -> Any:
            headers = {"Idempotency-Key": key}
            return await client.post(url, data, content_type="text/plain", headers=headers)

        first, second = await ask(), await ask()
        assert first.json() == second.json() == {"n": 1}
        assert first.status_code == second.status_code
        assert [replays(first), replays(second)] == [False, True]
        assert problem(await ask("2"))[0] == 422
        assert problem(await ask(key=""))[0] == 400
        assert (await client.get("/in_coroutine")).json() == {"n": 2}

    run(main)
    assert effects() == 2


@servers
def test_of_two_async_at_a_time_one_is_told_to_wait(
    ada: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        @idempotent(atomic=False)
        async def view(request: HttpRequest) -> HttpResponse:
            begun.set()
            await asyncio.wait_for(go_on.wait(), 10)
            return HttpResponse("done")

        def ask() -> Any:
            request = RequestFactory().post("/", headers={"Idempotency-Key": "k"})
            request.user = ada
            return view(request)

        first = asyncio.create_task(ask())
        await asyncio.wait_for(begun.wait(), 10)
        assert (await ask()).status_code == 409
        go_on.set()
        assert (await first).content == b"done"
        assert replays(await ask())

    run(main)


def test_a_template_of_an_async_view(ada: User) -> None:
    async def main() -> None:
        client = AsyncClient()
        await client.aforce_login(ada)
        headers = {"Idempotency-Key": "k"}
        url = "/template_in_coroutine"
        answers = [await client.post(url, headers=headers) for _ in range(2)]
        assert [answer.content for answer in answers] == [b"<p>1</p>"] * 2

    run(main)


# -- Django REST framework ------------------------------------------------------------------------


def rest(user: str, url: str, data: Any = '{"amount": 1}', method: str = "post", **how: Any) -> Any:
    credentials = base64.b64encode(f"{user}:x".encode()).decode()
    headers = {"Idempotency-Key": "k", "Authorization": f"Basic {credentials}"}
    how.setdefault("content_type", "application/json")
    client = Client(raise_request_exception=False)
    return getattr(client, method)(url, data, headers=headers, **how)


@pytest.mark.parametrize(
    "url", ["/rest", "/rest_reads", "/rest_function", "/rest_set", "/rest_extra"]
)
def test_rest_framework(ada: User, bob: User, url: str, atomic_requests: bool) -> None:
    """Its own authentication counts, its data is rendered, and whoever reads it first."""
    first, second, other = rest("ada", url), rest("ada", url), rest("bob", url)
    assert (first.status_code, first.json()["n"]) == (second.status_code, 1)
    assert second.content == first.content
    assert second["Content-Type"] == first["Content-Type"] == "application/json"
    assert [replays(answer) for answer in (first, second, other)] == [False, True, False]
    assert other.json()["n"] == 2
    assert problem(rest("ada", url, '{"amount": 2}'))[0] == 422
    assert problem(post(Client(), url))[0] == 403


def test_data_that_a_permission_has_read(ada: User) -> None:
    """A parser may leave no body behind."""

    def send(text: str) -> Any:
        return rest("ada", "/rest_reads", text, content_type="text/plain")

    assert send("one").json() == {"n": 1, "got": "one"}
    assert replays(send("one"))
    assert problem(send("two"))[0] == 422


def test_the_form_of_a_rest_view(ada: User) -> None:
    def send(content: bytes) -> Any:
        data = {"a": 1, "file": SimpleUploadedFile("f", content)}
        credentials = base64.b64encode(b"ada:x").decode()
        headers = {"Idempotency-Key": "k", "Authorization": f"Basic {credentials}"}
        return Client().post("/rest_set", data, headers=headers)

    assert send(b"x").json() == {"n": 1}
    assert replays(send(b"x"))
    assert problem(send(b"y"))[0] == 422


def test_an_error_that_a_rest_view_raises_undoes_all(ada: User, atomic_requests: bool) -> None:
    for _ in range(2):
        answer = rest("ada", "/rest", method="put")
        assert (answer.status_code, answer.json(), effects()) == (400, {"n": "1"}, 0)
    assert Job.objects.count() == 0


@pytest.mark.parametrize("url", ["/rest_wrong", "/rest_wrong_too"])
def test_above_rest_framework_is_the_wrong_place(client: Client, url: str) -> None:
    client.raise_request_exception = True
    with pytest.raises(ImproperlyConfigured, match="idempotent goes under the decorators"):
        post(client, url)
    for view in (
        views.rest_function,
        views.Rest.as_view(),
        views.RestSet.as_view({"post": "create"}),
    ):
        with pytest.raises(ImproperlyConfigured, match="def post"):
            idempotent(view)


# -- misuse ---------------------------------------------------------------------------------------


def test_bad_arguments() -> None:
    async def never(what: Any) -> str:
        return ""

    wrong: list[tuple[type[Exception], dict[str, Any]]] = [
        (ValueError, {"anonymous": "allow"}),
        (TypeError, {"final": True}),
        (TypeError, {"required": 1}),
        (TypeError, {"keep": "day"}),
        (TypeError, {"atomic": None}),
        (ValueError, {"using": "nowhere"}),
        # A coroutine is always true, and one looks like the other.
        (TypeError, {"anonymous": never}),
        (TypeError, {"final": never}),
    ]
    for error, how in wrong:
        with pytest.raises(error, match=next(iter(how))):
            idempotent(**how)


def test_what_cannot_be_decorated() -> None:
    async def view(request: HttpRequest) -> HttpResponse:
        return HttpResponse()

    with pytest.raises(TypeError, match="atomic=False"):
        idempotent(view)
    with pytest.raises(TypeError, match="method_decorator"):
        idempotent(View)
    decorated: Callable[..., Any] = idempotent(lambda *args: HttpResponse())
    with pytest.raises(TypeError, match="without a request"):
        decorated("no request")
