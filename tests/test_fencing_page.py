"""The recipes of docs/fencing.md, against receivers that compare and set as the real ones do."""

from __future__ import annotations

import hashlib
import io
import random
import re
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from django.db import connection, connections
from django.test import RequestFactory
from django.test.utils import isolate_apps

from distlock import StaleToken, lock
from distlock.fencing import FencedModel
from tests.support import in_thread

pytestmark = pytest.mark.django_db(transaction=True, databases=["default", "other"])

PAGE = Path(__file__).parent.parent / "docs" / "fencing.md"
OLD, NEW = 1_000, 2_000


def blocks(language: str) -> list[str]:
    """The code blocks of the page, each at its own line of an otherwise empty text."""
    text = PAGE.read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n" * text[: match.start(1)].count("\n") + match[1] for match in found]


class ClientError(Exception):
    """As in botocore."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}}


class PreconditionFailed(Exception):
    """As in google.api_core.exceptions."""


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What the page defines, after all of it has run with "other" as the database "billing"."""
    stubs = {"botocore.exceptions": ClientError, "google.api_core.exceptions": PreconditionFailed}
    for name, error in stubs.items():
        for part in (name.split(".")[0], name.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
        module = types.ModuleType(name)
        setattr(module, error.__name__, error)
        monkeypatch.setitem(sys.modules, name, module)
    names: dict[str, Any] = {"__name__": "tests.app.models"}
    tables: list[type[FencedModel]] = []
    connections["billing"] = connections["other"]
    try:
        with isolate_apps("tests.app"):
            for block in blocks("python"):
                exec(compile(block, PAGE, "exec"), names)
                for value in list(names.values()):
                    new = isinstance(value, type) and issubclass(value, FencedModel)
                    if new and value is not FencedModel and value not in tables:
                        with connections["other"].schema_editor() as editor:
                            editor.create_model(value)
                        tables.append(value)
            yield names
    finally:
        for model in tables:
            with connections["other"].schema_editor() as editor:
                editor.delete_model(model)
        del connections["billing"]


def stored(page: dict[str, Any], number: str = "42") -> tuple[str, int, int]:
    row: tuple[str, int, int]
    row = (
        page["Invoice"]
        .objects.using("other")
        .values_list("state", "total", "fencing_token")
        .get(number=number)
    )
    return row


def test_every_block_of_the_page_is_of_a_kind_that_runs_here() -> None:
    assert set(re.findall(r"^```(.*)$", PAGE.read_text(), re.MULTILINE)) == {"", "python", "sql"}
    assert blocks("python")
    assert len(blocks("sql")) == 1


# -- rows --------------------------------------------------------------------------------


def test_the_examples_of_rows_do_what_they_say(page: dict[str, Any]) -> None:
    with lock("invoice:42") as lease:
        state, total, token = stored(page)
        assert (state, total) == ("closed", 100)
        assert token < lease.token
    fence = page["Fence"].objects.using("other").get(name="month-end")
    assert fence.fencing_token > token
    with pytest.raises(StaleToken):
        page["Fence"](name="month-end").fenced_save(token, using="other")


def test_sql_by_hand_compares_too(page: dict[str, Any]) -> None:
    invoice = page["Invoice"](number="7")
    invoice.save(using="other")
    page["send"]("7", NEW)
    page["Invoice"].objects.using("other").update(state="new")
    page["send"]("7", NEW)
    assert stored(page, "7") == ("sent", 0, NEW)
    with pytest.raises(StaleToken) as told:
        page["send"]("7", OLD)
    assert (told.value.token, told.value.seen) == (OLD, NEW)
    with pytest.raises(LookupError):
        page["send"]("8", NEW)


@pytest.mark.vendor("sqlite", "postgresql")
def test_the_upsert_by_hand_compares_too(page: dict[str, Any]) -> None:
    def upsert(token: int) -> int:
        with connections["other"].cursor() as cursor:
            cursor.execute(blocks("sql")[0], ["9", token])
            return int(cursor.rowcount)

    assert [upsert(token) for token in (OLD, NEW, OLD, NEW)] == [1, 1, 0, 1]
    assert stored(page, "9") == ("sent", 0, NEW)


# -- object stores -------------------------------------------------------------------------


class Store:
    """S3's conditional writes: an ETag is the MD5 of the contents, and of nothing else."""

    class exceptions:  # noqa: N801  (as in boto3)
        class NoSuchKey(ClientError):
            pass

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.before_put: Callable[[], None] = lambda: None
        self.written: list[tuple[str, bytes]] = []
        self._mutex = threading.Lock()

    def get_object(self, Bucket: str, Key: str) -> dict[str, Any]:  # noqa: N803
        if Key not in self.objects:
            raise self.exceptions.NoSuchKey("NoSuchKey")
        body, metadata = self.objects[Key]
        return {"Body": io.BytesIO(body), "ETag": self._etag(Key), "Metadata": metadata}

    def put_object(
        self,
        Bucket: str,  # noqa: N803
        Key: str,  # noqa: N803
        Body: str,  # noqa: N803
        IfMatch: str | None = None,  # noqa: N803
        IfNoneMatch: str | None = None,  # noqa: N803
        Metadata: dict[str, str] | None = None,  # noqa: N803
    ) -> None:
        if IfMatch or IfNoneMatch:
            self.before_put()
        with self._mutex:
            if IfMatch and Key not in self.objects:
                raise ClientError("NoSuchKey")
            if (IfNoneMatch and Key in self.objects) or (IfMatch and IfMatch != self._etag(Key)):
                raise ClientError("PreconditionFailed")
            self.objects[Key] = (Body.encode(), Metadata or {})
            self.written.append((Key, Body.encode()))

    def _etag(self, key: str) -> str:
        return f'"{hashlib.md5(self.objects[key][0]).hexdigest()}"'


def once(store: Any, do: Callable[[], Any]) -> None:
    """Let something happen between a writer's read and its conditional write."""

    def before() -> None:
        store.before_put = lambda: None
        do()

    store.before_put = before


@pytest.mark.vendor("sqlite")
def test_s3_takes_the_newer_and_refuses_the_older(page: dict[str, Any]) -> None:
    store, publish = Store(), page["publish"]
    for token, body in ((OLD, "old"), (NEW, "new"), (NEW, "newer")):
        publish(store, "b", "k", token, body)
        assert page["read"](store, "b", "k") == body.encode()
    with pytest.raises(StaleToken) as told:
        publish(store, "b", "k", OLD, "late")
    assert told.value.seen == NEW
    assert page["read"](store, "b", "k") == b"newer"


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize("exists", [False, True])
def test_s3_refuses_the_older_also_between_its_read_and_its_write(
    page: dict[str, Any], exists: bool
) -> None:
    store, publish = Store(), page["publish"]
    if exists:
        publish(store, "b", "k", 1, "first")
    once(store, lambda: publish(store, "b", "k", NEW, "same"))
    with pytest.raises(StaleToken):
        publish(store, "b", "k", OLD, "same")
    assert page["read"](store, "b", "k") == b"same"
    once(store, lambda: publish(store, "b", "k", NEW, "new"))
    publish(store, "b", "k", NEW + 1, "newest")
    assert page["read"](store, "b", "k") == b"newest"


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize("code", ["ConditionalRequestConflict", "NoSuchKey"])
def test_s3_is_asked_again_when_another_request_was_in_the_way(
    page: dict[str, Any], code: str
) -> None:
    store = Store()

    def conflict() -> None:
        raise ClientError(code)

    once(store, conflict)
    page["publish"](store, "b", "k", NEW, "new")
    assert page["read"](store, "b", "k") == b"new"
    once(store, lambda: (_ for _ in ()).throw(ClientError("AccessDenied")))
    with pytest.raises(ClientError, match="AccessDenied"):
        page["publish"](store, "b", "k", NEW, "new")


@pytest.mark.vendor("sqlite")
def test_s3_pointers_are_written_in_the_order_of_tokens(page: dict[str, Any]) -> None:
    store = Store()

    def holder(number: int) -> None:
        for token in random.Random(number).sample(range(1, 100), 40):
            with suppress(StaleToken):
                page["publish"](store, "b", "k", token, "body")

    threads = [threading.Thread(target=holder, args=[number]) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    tokens = [page["json"].loads(body)["token"] for key, body in store.written if key == "k"]
    assert tokens == sorted(tokens)
    assert len(set(tokens)) > 1


@pytest.mark.vendor("sqlite")
def test_a_token_in_the_metadata_of_s3_is_no_fence() -> None:
    """What the page warns of: the same contents have the same ETag, whoever wrote them."""
    store = Store()

    def put(token: int, body: str) -> None:
        found = store.get_object("b", "k")
        if int(found["Metadata"]["token"]) > token:
            raise StaleToken
        store.put_object("b", "k", body, IfMatch=found["ETag"], Metadata={"token": str(token)})

    store.put_object("b", "k", "same", Metadata={"token": "1"})
    once(store, lambda: put(NEW, "same"))
    put(OLD, "late")  # no StaleToken
    assert store.objects["k"] == (b"late", {"token": str(OLD)})


class Bucket:
    """Cloud Storage's preconditions: every upload has a new generation."""

    def __init__(self) -> None:
        self.blobs: dict[str, types.SimpleNamespace] = {}
        self.before_put: Callable[[], None] = lambda: None
        self._generations = iter(range(1, 1000))

    def get_blob(self, name: str) -> Any:
        return self.blobs.get(name)

    def blob(self, name: str) -> Any:
        def upload_from_string(data: str, if_generation_match: int | None = None) -> None:
            self.before_put()
            current = self.blobs.get(name)
            generation = current.generation if current else 0
            if if_generation_match not in (None, generation):
                raise PreconditionFailed
            self.blobs[name] = types.SimpleNamespace(
                data=data, metadata=new.metadata, generation=next(self._generations)
            )

        new = types.SimpleNamespace(metadata=None, upload_from_string=upload_from_string)
        return new


@pytest.mark.vendor("sqlite")
@pytest.mark.parametrize("metadata", [None, {}, {"fencing-token": "1"}, "absent"], ids=str)
def test_cloud_storage_refuses_the_older(page: dict[str, Any], metadata: Any) -> None:
    bucket, upload = Bucket(), page["upload"]
    if metadata != "absent":
        bucket.blobs["n"] = types.SimpleNamespace(data="", metadata=metadata, generation=7)
    once(bucket, lambda: upload(bucket, "n", NEW, "same"))
    with pytest.raises(StaleToken) as told:
        upload(bucket, "n", OLD, "same")
    assert told.value.seen == NEW
    once(bucket, lambda: upload(bucket, "n", NEW, "again"))
    upload(bucket, "n", NEW + 1, "newest")
    assert bucket.blobs["n"].data == "newest"
    assert bucket.blobs["n"].metadata == {"fencing-token": str(NEW + 1)}


# -- HTTP ----------------------------------------------------------------------------------


@contextmanager
def served(answer: Callable[[str, str, dict[str, str], bytes], tuple[int, bytes]]) -> Iterator[str]:
    """A receiver in this process; yields its URL."""

    class Handler(BaseHTTPRequestHandler):
        def handle_one(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, said = answer(self.command, self.path, dict(self.headers), body)
            self.send_response(status)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_PUT = do_POST = handle_one  # noqa: N815

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()


def test_an_api_refuses_the_older(page: dict[str, Any]) -> None:
    def view(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        def respond() -> tuple[int, bytes]:
            connections["billing"] = connections["other"]
            given = {"headers": {"Fencing-Token": token}} if token is not None else {}
            request = RequestFactory().generic(method, path, body, **given)
            response = page["invoice_view"](request, path.strip("/"))
            return response.status_code, response.content

        token = headers.get("Fencing-Token")
        return in_thread(respond)

    put = page["put_state"]
    with served(view) as url:
        assert put(f"{url}/7", OLD, "draft") == 204
        assert put(f"{url}/7", NEW, "sent") == 204
        assert put(f"{url}/7", NEW, "paid") == 204
        with pytest.raises(StaleToken) as told:
            put(f"{url}/7", OLD, "late")
        assert told.value.token == OLD
        for token in ("", "x", "0", "-1"):
            with pytest.raises(page["HTTPError"]) as refused:
                put(f"{url}/7", token, "unfenced")
            assert refused.value.code == 428
    assert stored(page, "7") == ("paid", 0, NEW)


@pytest.mark.vendor("sqlite")
def test_an_idempotency_key_is_the_same_for_every_holder(page: dict[str, Any]) -> None:
    done: dict[str, bytes] = {}
    charges: list[bytes] = []

    def bank(method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        key = headers["Idempotency-Key"]
        if key not in done:
            charges.append(body)
            done[key] = f"charge {len(charges)}".encode()
        return 200, done[key]

    with served(bank) as url:
        answers = [page["charge"](url, number, 100) for number in ("42", "42", "43")]
    assert answers == [b"charge 1", b"charge 1", b"charge 2"]
    assert charges == [b"100", b"100"]


# -- files ---------------------------------------------------------------------------------


@pytest.mark.vendor("sqlite")
def test_the_newest_file_is_read_whoever_writes_last(page: dict[str, Any], tmp_path: Path) -> None:
    write, newest = page["write_report"], page["newest_report"]
    for token, text in ((5, "first"), (10, "new"), (10, "newer"), (9, "late")):
        write(tmp_path, token, text)
    assert newest(tmp_path) == "newer"
    write(tmp_path, 10**15, "newest")
    assert newest(tmp_path) == "newest"
    assert not list(tmp_path.glob("draft*"))


def test_this_page_leaves_nothing_behind() -> None:
    assert "billing" not in {one.alias for one in connections.all()}
    assert "invoice" not in connections["other"].introspection.table_names()
    assert connection.alias == "default"
