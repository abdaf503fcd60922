"""The Django app."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks as django_checks
from django.utils.translation import gettext_lazy as _


class DistlockConfig(AppConfig):
    """Registers the system checks and the log receivers."""

    name = "distlock"
    verbose_name = _("Distributed locks")
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Connect what listens; runs once, when Django starts."""
        from . import checks, events, longholds

        django_checks.register(checks.check_settings)
        django_checks.register(checks.check_database, django_checks.Tags.database)
        events.connect()
        longholds.connect()
