"""The actions on jobs: free the key, run again. See `reruns.py` for what each may do.

The row and its audit entry are one transaction, as those of a forced release. A message goes to the
broker after the commit; what cannot be sent then, `resend_jobs` sends.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from django.contrib import admin, messages
from django.contrib.admin.models import LogEntry
from django.core.exceptions import BadRequest
from django.db import DatabaseError, router, transaction
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils.translation import gettext as _
from django.utils.translation import gettext_lazy, ngettext

from .. import reruns
from ..conf import settings
from ..events import log
from ..reruns import Way, can_be_freed, way_of
from ..states import JobState, microseconds
from .common import ReadOnlyAdmin, apart
from .confirming import Question, ask, confirmed, selected

if TYPE_CHECKING:
    from ..models import Job

FREE = Question(
    action="free",
    title=gettext_lazy("Free the keys of these jobs?"),
    text=gettext_lazy(
        "The next call of enqueue_once() queues such a job anew. Its old message, should it still "
        "come, does not run. Do this if the message is lost, or must not run any more."
    ),
    button=gettext_lazy("Yes, free them"),
    columns=("job", "badge", "task_shown", "attempts_shown", "expires"),
)
RERUN = Question(
    action="rerun",
    title=gettext_lazy("Let these jobs run again?"),
    text=gettext_lazy("A job that has done its work does it once more: see that this is right."),
    button=gettext_lazy("Yes, run them again"),
    columns=("job", "badge", "task_shown", "finished", "what_happens"),
)
HAPPENS = {
    Way.PUBLISH: gettext_lazy(
        "Its message is published once more, under the same task id. It runs once."
    ),
    Way.QUEUE: gettext_lazy(
        "It is queued with the arguments that are stored, under a new task id."
    ),
    Way.FORGET: gettext_lazy(
        "Its receipt is forgotten. Nothing runs now: the next call, delivery or request does."
    ),
}
LEFT_ALONE = gettext_lazy(
    "The job %(key)r was left alone: it has changed, its lock is held, or a transaction has it."
)


class Rerunning(ReadOnlyAdmin):
    """The actions `free` and `rerun`."""

    def has_free_permission(self, request: HttpRequest) -> bool:
        """Whoever has the permission `free_job`."""
        return request.user.has_perm("distlock.free_job")

    def has_rerun_permission(self, request: HttpRequest) -> bool:
        """Whoever has the permission `rerun_job`."""
        return request.user.has_perm("distlock.rerun_job")

    def detail_context(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        """Return the buttons of the detail view, and why there is none."""
        buttons = []
        if self.has_free_permission(request) and can_be_freed(row):
            buttons.append(("free", _("Free the key…")))
        if self.has_rerun_permission(request) and _way(row) is not Way.NONE:
            buttons.append(("rerun", _("Run again…")))
        return {"buttons": buttons, "explained": _explained(row)}

    @admin.display(description=gettext_lazy("task"))
    def task_shown(self, row: Any) -> str:
        """Return the task."""
        return str(row.task)

    @admin.display(description=gettext_lazy("what happens"))
    def what_happens(self, row: Any) -> str:
        """Return what running it again means."""
        return str(HAPPENS[_way(row)])

    @admin.action(permissions=["free"], description=gettext_lazy("Free the selected jobs"))
    def free(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Ask first; then free the key of each job that is as it was shown."""
        return self._ask_or(request, queryset, FREE, can_be_freed, self._free)

    @admin.action(permissions=["rerun"], description=gettext_lazy("Run the selected jobs again"))
    def rerun(self, request: HttpRequest, queryset: QuerySet[Any]) -> HttpResponse | None:
        """Ask first; then let each job run again that is as it was shown."""
        return self._ask_or(
            request, queryset, RERUN, lambda row: _way(row) is not Way.NONE, self._rerun
        )

    def _ask_or(
        self, request: HttpRequest, queryset: QuerySet[Any], question: Question, may: Any, do: Any
    ) -> HttpResponse | None:
        chosen = confirmed(request, 6)
        if chosen is not None:
            for job, shown in [(self._found(request, each), each) for each in chosen]:
                self._do_or_tell(request, job, shown, may, do)
            return None
        rows = selected(self, request, queryset)
        if rows is None:
            return None
        self.complete(request, rows)
        able = [row for row in rows if may(row)]
        if not able:
            text = _("There is nothing to do for the selected jobs.")
            self.message_user(request, text, messages.WARNING)
            return None
        others = len(rows) - len(able)
        return ask(self, request, question, [(row, _shown(row)) for row in able], _left_out(others))

    def _do_or_tell(
        self, request: HttpRequest, job: Any, shown: list[Any], may: Any, do: Any
    ) -> None:
        """Do it for one job, or tell why not: what was done for others stands."""
        text, said = LEFT_ALONE, {"key": shown[1], "error": ""}
        try:
            with apart(settings().USING):
                # Of the same state, it is told by the row itself whether anything has changed.
                if job is not None and _shown(job) == shown and may(job) and do(request, job):
                    return
        except DatabaseError as error:
            log(logging.ERROR, "job_not_changed key=%r", key=shown[1], exc_info=True)
            text = gettext_lazy("The job %(key)r was left alone. The database says: %(error)s")
            said["error"] = str(error)
        self.message_user(request, text % said, messages.ERROR)

    def _found(self, request: HttpRequest, chosen: list[Any]) -> Any:
        pk = chosen[0]
        if isinstance(pk, str):
            raise BadRequest(f"Not the primary key of a job: {pk!r}.")
        found = list(self.get_queryset(request).filter(pk=pk))
        self.complete(request, found)
        return found[0] if found else None

    # -- what is done ----------------------------------------------------------------------------

    def _free(self, request: HttpRequest, job: Job) -> bool:
        alias = settings().USING
        with transaction.atomic(using=alias):
            if not reruns.free(alias, job):
                return False
            self._note(request, job, "freed", f"Freed: it was {job.state}, task id {job.task_id}.")
        return True

    def _rerun(self, request: HttpRequest, job: Any) -> bool:
        alias, way, old = settings().USING, _way(job), job.task_id
        with transaction.atomic(using=alias):
            if way is Way.FORGET:
                if not reruns.forget(alias, job):
                    return False
                self._note(request, job, "forgotten", f"Receipt forgotten: token {job.token}.")
                return True
            task = _tasks().get(job.task)
            if task is None:
                text = _("This project's Celery app has no task %(task)s: %(key)r was left alone.")
                said = text % {"task": job.task, "key": job.key}
                self.message_user(request, said, messages.ERROR)
                return True
            if reruns.again(alias, job, way) is None:
                return False
            self._note(request, job, "rerun", f"Queued again as {job.task_id}; it was {old}.")
            send = partial(self._send, request, task, alias, job)
            transaction.on_commit(send, using=alias, robust=True)
        return True

    def _note(self, request: HttpRequest, job: Job, what: str, message: str) -> None:
        with apart(router.db_for_write(LogEntry)):
            self.log_change(request, job, message)
        by, alias = request.user.get_username(), settings().USING

        def tell() -> None:
            said = "job_changed key=%r task_id=%r change=%r by=%r"
            log(logging.WARNING, said, key=job.key, task_id=job.task_id, change=what, by=by)
            text = DONE[what] % {"key": job.key}
            self.message_user(request, text, messages.SUCCESS)

        transaction.on_commit(tell, using=alias, robust=True)

    def _send(self, request: HttpRequest, task: Any, alias: str, job: Job) -> None:
        from ..contrib._enqueue import publish

        try:
            publish(task, alias, job)
        except Exception:
            said = "job_unpublished key=%r: left to resend_jobs"
            log(logging.WARNING, said, key=job.key, exc_info=True)
            text = _("The message of %(key)r could not be sent: it is left to resend_jobs.")
            self.message_user(request, text % {"key": job.key}, messages.WARNING)


DONE = {
    "freed": gettext_lazy("The key of the job %(key)r is free."),
    "forgotten": gettext_lazy("The receipt of %(key)r is forgotten: the next call runs it."),
    "rerun": gettext_lazy("The job %(key)r is queued."),
}


def _way(row: Any) -> Way:
    """Return how a job can be let run again in this project."""
    way = way_of(row)
    return Way.NONE if way in (Way.PUBLISH, Way.QUEUE) and not _has_celery() else way


def _has_celery() -> bool:
    try:
        from ..contrib import _enqueue  # noqa: F401
    except ImportError:
        return False
    return True


def _tasks() -> Any:
    """Return the tasks of the project's Celery app, loaded as a worker loads them."""
    from celery import current_app

    current_app.loader.import_default_modules()
    return current_app.tasks


def _shown(row: Any) -> list[Any]:
    """Return what must still be so when it is confirmed."""
    return [row.pk, row.key, row.task_id, str(row.status), row.token, microseconds(row.expires_at)]


def _explained(row: Any) -> str:
    """Return what can be done with a job where there is no button for it."""
    if row.status == JobState.RUNNING:
        return _("It runs: its lock is held. Nothing can be done with it before that is free.")
    if way_of(row) is Way.NONE:
        return _("The next call runs it. It cannot be run from here: its arguments are not stored.")
    return ""


def _left_out(count: int) -> str:
    if not count:
        return ""
    text = ngettext(
        "%d more selected job is left out: there is nothing to do for it.",
        "%d more selected jobs are left out: there is nothing to do for them.",
        count,
    )
    return text % count
