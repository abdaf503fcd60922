"""Settings of the test suite. The environment says which database: see ``tests/run.py``.

DISTLOCK_TEST_URL   sqlite:///path, postgresql://... or mariadb://...; default: a new SQLite file
DISTLOCK_USE_TZ     0 switches USE_TZ off
DISTLOCK_TIME_ZONE  default America/New_York: it has daylight saving and is not the servers' zone
"""

from __future__ import annotations

import importlib.util
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.databases import settings_for


def alias(suffix: str) -> dict[str, Any]:
    """One alias: the database of the URL with a suffix to its name, on the same server."""
    at = settings_for(os.environ["DISTLOCK_TEST_URL"])
    at["NAME"] += suffix
    if at["ENGINE"].endswith("sqlite3"):
        # A file, not memory: threads and processes have to meet in it.
        return at | {"TEST": {"NAME": f"{at['NAME']}.test"}, "OPTIONS": {"timeout": 20}}
    if at["ENGINE"].endswith("mysql"):
        return at | {"TEST": {"CHARSET": "utf8mb4"}, "OPTIONS": {"charset": "utf8mb4"}}
    return at


# Set in the environment, so that a process which a test starts finds the same database.
if "DISTLOCK_TEST_URL" not in os.environ:
    folder = Path(__file__).resolve().parent.parent / ".test-results"
    folder.mkdir(exist_ok=True)
    os.environ["DISTLOCK_TEST_URL"] = f"sqlite:///{folder}/sqlite-{os.getpid()}"

DATABASES = {"default": alias(""), "other": alias("_other")}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

USE_TZ = os.environ.get("DISTLOCK_USE_TZ", "1") != "0"
TIME_ZONE = os.environ.get("DISTLOCK_TIME_ZONE", "America/New_York")

SECRET_KEY = "only for the tests"
ROOT_URLCONF = "tests.urls"
STATIC_URL = "static/"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django_tasks_db",
    "distlock",
    "tests.app",
    # It allows no Django later than 6.0, and is installed where Django is older (setup.cfg).
    *(["django_celery_beat"] if find_spec("django_celery_beat") else []),
]
DJANGO_TASKS = "django.tasks" if importlib.util.find_spec("django.tasks") else "django_tasks"
"""Django's own tasks, or before Django 6 their backport."""
TASKS = {
    "default": {"BACKEND": "django_tasks_db.DatabaseBackend", "QUEUES": []},
    "immediate": {"BACKEND": f"{DJANGO_TASKS}.backends.immediate.ImmediateBackend"},
}
MIDDLEWARE = [
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ],
        },
    },
]
