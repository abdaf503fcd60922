"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig


class PrometheusConfig(AppConfig):
    """Counts from the moment that Django is ready."""

    name = "distlock.contrib.prometheus"
    label = "distlock_prometheus"
    verbose_name = "Metrics of locks for Prometheus"

    def ready(self) -> None:
        """Connect what counts."""
        from . import install

        install()
