"""The settings of the suite, with what a browser needs: static files."""

from __future__ import annotations

from tests.settings import *  # noqa: F403

DEBUG = True
ALLOWED_HOSTS = ["127.0.0.1"]
ROOT_URLCONF = "tests.browser.urls"
INSTALLED_APPS = [*INSTALLED_APPS, "django.contrib.staticfiles"]  # noqa: F405
