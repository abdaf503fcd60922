"""Settings of the example.

DATABASE_URL   sqlite:///path (default), postgresql://user:password@host/name, mariadb://..
BROKER_URL     Celery's broker; default: SQLAlchemy over a SQLite file, so that no server is needed
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

BASE_DIR = Path(__file__).resolve().parent
ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}


def database(url: str) -> dict[str, Any]:
    """Return Django's settings for a database URL."""
    parts = urlsplit(url)
    options: dict[str, Any] = {}
    if parts.scheme == "sqlite":
        options = {
            # Several processes write: wait for each other, and let readers read meanwhile.
            "timeout": 20,
            "init_command": "PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL",
            # A transaction that reads first and writes later would fail as soon as somebody else
            # has written in between ("database is locked", without any waiting).
            "transaction_mode": "IMMEDIATE",
        }
    return {
        "ENGINE": f"django.db.backends.{ENGINES[parts.scheme]}",
        "NAME": unquote(parts.path[1:]),
        "USER": unquote(parts.username or ""),
        "PASSWORD": unquote(parts.password or ""),
        "HOST": parts.hostname or "",
        "PORT": parts.port or "",
        "OPTIONS": options,
    }


SQLITE = f"sqlite:///{BASE_DIR / 'shop.sqlite3'}"
DATABASES = {"default": database(os.environ.get("DATABASE_URL", SQLITE))}
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.admin",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "distlock",
    "example_project.shop",
]
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

DEBUG = True
SECRET_KEY = "not a secret: this is an example"
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
API_KEYS = {"demo": "the demo client"}  # whose requests to /api/ are answered
ROOT_URLCONF = "example_project.urls"
STATIC_URL = "static/"
USE_TZ = True
TIME_ZONE = "UTC"

BROKER_FILE = BASE_DIR / "broker.sqlite3"
CELERY_BROKER_URL = os.environ.get("BROKER_URL", f"sqla+sqlite:///{BROKER_FILE}")
CELERY_BROKER_TRANSPORT_OPTIONS = (
    {"connect_args": {"timeout": 20}} if CELERY_BROKER_URL.startswith("sqla+sqlite") else {}
)
CELERY_BROKER_CONNECTION_RETRY_ON_STARTUP = True
CELERY_TASK_IGNORE_RESULT = True
CELERY_WORKER_PREFETCH_MULTIPLIER = 1
CELERY_WORKER_ENABLE_REMOTE_CONTROL = False  # this broker cannot broadcast
CELERY_TIMEZONE = TIME_ZONE
