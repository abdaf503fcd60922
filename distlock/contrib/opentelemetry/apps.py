"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig


class OpenTelemetryConfig(AppConfig):
    """Traces from the moment that Django is ready."""

    name = "distlock.contrib.opentelemetry"
    label = "distlock_opentelemetry"
    verbose_name = "Spans of locks for OpenTelemetry"

    def ready(self) -> None:
        """Connect what traces."""
        from . import install

        install()
