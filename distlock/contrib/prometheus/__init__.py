"""Metrics of locks for Prometheus: `"distlock.contrib.prometheus"` in INSTALLED_APPS, and no more.

Needs prometheus-client (`django-distlock[prometheus]`). The metrics are in its default registry, so
what serves that, such as django-prometheus, serves them too. docs/monitoring.md lists them.
"""

from __future__ import annotations

from ._receivers import install

__all__ = ["install"]
