"""PostgreSQL: which commits wait for the disk. A trigger notes the setting that COMMIT finds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from django.db import connection
from django.db import transaction as django_transaction

from distlock.backends.base import Backend
from tests.conformance.rows import TABLE, execute, expire, purge, query, take

pytestmark = [pytest.mark.vendor("postgresql"), pytest.mark.backends("PostgreSQL")]

TRIGGER = f"""
CREATE TABLE noted (id serial, setting text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO noted (setting) VALUES (current_setting('synchronous_commit')); RETURN NULL;
END $$;
CREATE CONSTRAINT TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON {TABLE}
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note();
"""


@pytest.fixture(autouse=True)
def noted(backend: Backend) -> Iterator[None]:
    execute("RESET synchronous_commit")
    execute(TRIGGER, None)  # type: ignore[arg-type]
    yield
    execute(f"DROP TRIGGER note ON {TABLE}")
    execute("DROP FUNCTION note()")
    execute("DROP TABLE noted")


def commits() -> list[str]:
    """What the commits since the last call found."""
    found = [row[0] for row in query("SELECT setting FROM noted ORDER BY id")]
    execute("DELETE FROM noted")
    return found


def setting() -> str:
    return str(query("SHOW synchronous_commit")[0][0])


def test_a_release_of_its_own_is_asynchronous_and_leaves_the_session_alone(
    backend: Backend,
) -> None:
    held = take(backend)
    assert commits() == ["on"]
    assert backend.release(connection, held, alone=True)
    assert commits() == ["off"]
    assert setting() == "on"


def test_a_release_inside_a_transaction_never_touches_its_setting(backend: Backend) -> None:
    held = take(backend)
    commits()
    with django_transaction.atomic():
        assert backend.release(connection, held, alone=False)
        assert query("SELECT current_setting('synchronous_commit')") == [("on",)]
    assert commits() == ["on"]
    assert setting() == "on"


def test_freeing_after_a_broken_transaction_is_asynchronous(backend: Backend) -> None:
    held = take(backend)
    commits()
    assert backend.free(connection, held)
    assert commits() == ["off"]
    assert setting() == "on"


@pytest.mark.parametrize("found", ["new", "expired"])
def test_a_grant_waits_for_the_disk_unless_it_may_be_forgotten(
    backend: Backend, found: str
) -> None:
    for durable, wanted in ((True, "on"), (False, "off")):
        name = f"{found} {durable}"
        if found == "expired":
            take(backend, "before", name)
            expire(name)
            commits()
        take(backend, "me", name, durable=durable)
        assert commits() == [wanted]
        assert setting() == "on"


def test_a_renewal_a_force_and_a_purge_wait_for_the_disk(backend: Backend) -> None:
    held = take(backend)
    commits()
    assert backend.renew(connection, [held])["me"]
    assert commits() == ["on"]
    assert backend.force_release(connection, "n", 0, held.token)
    assert commits() == ["on"]
    assert purge(backend) == 1
    assert commits() == ["on", "on"]
    assert setting() == "on"


def test_the_choice_of_the_user_is_kept(backend: Backend) -> None:
    execute("SET synchronous_commit = 'local'")
    try:
        held = take(backend)
        assert backend.release(connection, held, alone=False)
        assert commits() == ["local", "local"]
        assert setting() == "local"
    finally:
        execute("RESET synchronous_commit")
