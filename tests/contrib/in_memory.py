"""A Celery app with its queue in memory, served by hand: what one process shows of a worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery
from celery.app.trace import trace_task


class Private(Celery):
    """An app whose tasks are not shared with every other one."""

    def task(self, *args: Any, **options: Any) -> Any:
        return super().task(*args, **{"shared": False} | options)


class Queue:
    """The app's queue, served by hand."""

    def __init__(self, app: Celery) -> None:
        self.app = app
        self.ran: list[Any] = []
        with self.app.connection_for_read() as opened:
            opened.default_channel.queue_purge("celery")

    def take(self) -> Any:
        with self.app.connection_for_read() as opened:
            return opened.default_channel.basic_get("celery", no_ack=True)

    def ids(self) -> list[str]:
        """The ids in the queue, which is empty afterwards."""
        found = []
        while (message := self.take()) is not None:
            found.append(message.headers["id"])
        return found

    def work(self, message: Any = None) -> Any:
        """Run one message as a worker does, and return the result, or the exception."""
        message = message or self.take()
        assert message is not None, "the queue is empty"
        args, kwargs, _ = message.decode()
        task: Any = self.app.tasks[message.headers["task"]]
        request = dict(message.headers, delivery_info={}, is_eager=False, called_directly=False)
        returned = trace_task(task, message.headers["id"], args, kwargs, request, app=self.app)
        return getattr(returned[1], "retval", returned[0])


@contextmanager
def app_in_memory() -> Iterator[Celery]:
    """The current app, for as long as that."""
    app = Private("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.broker_connection_retry = False
    app.set_current()
    with app.connection_for_write() as opened:
        opened.default_channel.queue_declare("celery")
    yield app
    app.close()


@contextmanager
def broker_down(app: Celery) -> Iterator[pytest.MonkeyPatch]:
    """The broker cannot be reached."""

    def refuse(*args: Any, **options: Any) -> Any:
        raise ConnectionRefusedError("the broker is down")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app.amqp, "send_task_message", refuse)
        yield patch
