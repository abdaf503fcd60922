"""What Celery does to Django's connections around every task does nothing to distlock's own."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from celery.fixups.django import DjangoWorkerFixup
from django.db import connection, connections, transaction

from distlock import lock
from distlock.connections import private
from tests.contrib import celery_app, tasks
from tests.contrib.conftest import Worker
from tests.support import eventually, is_free, sessions

pytestmark = [
    pytest.mark.django_db(transaction=True, databases=["default", "other"]),
    pytest.mark.vendor("postgresql", "mysql"),
]


@pytest.mark.parametrize("reuse", [None, 2])
def test_the_fixup_leaves_the_private_connection_and_the_leases_alone(reuse: int | None) -> None:
    connections.close_all()
    private("default").close_if_unused()
    before = sessions()
    fixup = DjangoWorkerFixup(celery_app.app)
    fixup.db_reuse_max = reuse
    for n in range(3):
        fixup.on_task_prerun(sender=tasks.connecting)
        lease = lock("x", ttl=0.6).acquire()
        with transaction.atomic(), lock("y", ttl=0.6):
            time.sleep(0.4)
        fixup.close_database()  # a task that is called inside another one
        time.sleep(0.4)
        lease.check()
        lease.release()
        fixup.on_task_postrun(sender=tasks.connecting)
        assert is_free("x"), n
    connections.close_all()
    assert eventually(lambda: len(sessions() - before) == 1)


@pytest.mark.parametrize(
    ("pool", "children", "processes"), [("prefork", 2, 2), ("threads", 4, 1), ("solo", 1, 1)]
)
def test_a_worker_has_one_private_connection_in_each_process(
    start_worker: Callable[..., Worker], pool: str, children: int, processes: int
) -> None:
    connections.close_all()
    private("default").close_if_unused()
    connection.ensure_connection()
    time.sleep(0.5)
    before = sessions()
    worker = start_worker(pool, "-P", pool, "-c", str(children), "-Q", pool)
    for _ in range(2):
        sent = [tasks.connecting.apply_async((n,), queue=pool) for n in range(2 * children)]
        assert [one.get(timeout=30) for one in sent] == ["done"] * len(sent)
    assert eventually(lambda: len(sessions() - before) <= processes), sessions() - before
    assert len(sessions() - before) == processes, "no private connection, so this proves nothing"
    worker.stop()
    assert eventually(lambda: not sessions() - before)
