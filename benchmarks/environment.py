"""Django, set up for one contender in this process, as a new project has it."""

from __future__ import annotations

from django.apps import apps
from django.conf import settings

from tests.databases import settings_for


def configure(url: str, installed: tuple[str, ...]) -> None:
    """Set Django up for a database. Harmless where a process has done so already."""
    import django

    if settings.configured and apps.ready:
        return
    database = settings_for(url)
    if database["ENGINE"].endswith("mysql"):
        database["OPTIONS"] = {"charset": "utf8mb4"}
    settings.configure(
        DATABASES={"default": database},
        INSTALLED_APPS=list(installed),
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        USE_TZ=True,
        SECRET_KEY="only for the benchmarks",
        SILENCED_SYSTEM_CHECKS=["django_mysql.W001"],
    )
    django.setup()


def migrate() -> None:
    """Make the tables of all apps, those without migrations included."""
    from django.core.management import call_command

    call_command("migrate", run_syncdb=True, verbosity=0)
