"""Spans of locks for OpenTelemetry: `"distlock.contrib.opentelemetry"` in INSTALLED_APPS.

Needs opentelemetry-api (`django-distlock[opentelemetry]`), and, to send spans anywhere, a tracer
provider that the project sets. docs/monitoring.md has both spans and their attributes.
"""

from __future__ import annotations

from ._receivers import install

__all__ = ["install"]
