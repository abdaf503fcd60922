"""The Celery app, and what beat sends: one job under a lock and one without, every few seconds.

Run one beat too many, and every tick is sent twice. That is what `make demo` does.
"""

from __future__ import annotations

import os

from celery import Celery
from celery.beat import BeatLazyFunc
from kombu.transport import sqlalchemy

from .schedules import INTERVAL, Aligned, tick_now

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.settings")

# How often this transport looks for messages, one second by itself. It is not among the options
# that it takes from the settings.
sqlalchemy.Transport.polling_interval = 0.1

app = Celery("example_project")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["example_project.shop"])

# Beat does not tell a job which tick it belongs to. Here it does, so that runs can be counted.
app.conf.beat_schedule = {
    name: {
        "task": f"example_project.shop.tasks.{name}",
        "schedule": Aligned(INTERVAL),
        "kwargs": {"tick": BeatLazyFunc(tick_now)},
    }
    for name in ("report", "control")
}
