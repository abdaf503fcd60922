"""The pytest plugin, and docs/testing.md, each in a pytest of its own."""

from __future__ import annotations

import configparser
import os
import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]
pytestmark = pytest.mark.vendor("sqlite", "postgresql")

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "testing.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
NAME = "django_distlock"

IN_MEMORY = """
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}
INSTALLED_APPS = ["distlock"]
USE_TZ = True
"""

FIXTURES = """
import pytest
from distlock import LockBusy, lock

def test_disabled_without_a_database(distlock_disabled, distlock_clock):
    with lock("x", ttl=30) as lease:
        distlock_clock.advance(60)
        lease.check()

@pytest.mark.django_db
def test_held(distlock_held_by_another, distlock_clock):
    holder = distlock_held_by_another("x", note="why")
    distlock_held_by_another("y")
    assert lock("x").holder() == holder
    with pytest.raises(LockBusy, match="why"):
        lock("x", wait=600).acquire()

def test_the_database_comes_first_whatever_the_order(distlock_held_by_another, db):
    distlock_held_by_another("x")
    assert lock("x").try_acquire() is None

@pytest.mark.django_db(transaction=True)
def test_nothing_is_left_over(distlock_held_by_another):
    lock("x", wait=0).acquire().release()
    distlock_held_by_another("x")

@pytest.mark.django_db(transaction=True)
def test_nor_here():
    with lock("x", wait=0.1), lock("y", wait=0):
        pass
"""

WITHOUT_PYTEST_DJANGO = """
import pytest
sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}

@pytest.fixture(scope="module", autouse=True)
def project():
    import django
    from django.conf import settings
    settings.configure(INSTALLED_APPS=["distlock"], DATABASES={"default": sqlite}, USE_TZ=True)
    django.setup()
    from django.core.management import call_command
    call_command("migrate", verbosity=0)

def test_all(distlock_clock, distlock_held_by_another):
    from distlock import LockBusy, lock
    distlock_held_by_another("x")
    with pytest.raises(LockBusy), lock("y", ttl=30) as lease:
        distlock_clock.advance(300)
        lease.check()
        lock("x", wait=600).acquire()

def test_a_lease_that_outlives_its_transaction_is_renewed(distlock_clock):
    from django.db import transaction
    from distlock import lock
    with transaction.atomic():
        lease = lock("z", ttl=30).acquire()
    distlock_clock.advance(100)
    lease.check()
    lease.release()

def test_disabled(distlock_disabled):
    from distlock import lock
    with lock("x"):
        pass
"""

NOTHING_IS_IMPORTED = """
import sys

def test_it():
    import pytest_distlock
    assert not {"django", "distlock", "asgiref"} & set(sys.modules)
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A folder in which the package is installed as setup.cfg says, with its entry point."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "pytest_distlock" in setup["options"]["py_modules"].split()
    installed = pytester.mkdir("installed")
    metadata = installed / f"{NAME}-0.0.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {NAME}\nVersion: 0.0.0\n")
    entries = setup["options.entry_points"]["pytest11"].strip()
    (metadata / "entry_points.txt").write_text(f"[pytest11]\n{entries}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(installed), str(ROOT)]))
    monkeypatch.delenv("DJANGO_SETTINGS_MODULE", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\naddopts = -p no:cacheprovider\nfilterwarnings = error")
    return pytester


def run(project: pytest.Pytester, *options: str, passed: int) -> None:
    done = project.runpytest_subprocess(*options, timeout=100)
    done.assert_outcomes(passed=passed)


@pytest.fixture
def on_this_database(
    project: pytest.Pytester, django_db_setup: None, monkeypatch: pytest.MonkeyPatch
) -> pytest.Pytester:
    """That folder, with the settings and the database of the tests."""
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "tests.settings")
    return project


def test_the_fixtures(on_this_database: pytest.Pytester) -> None:
    on_this_database.makepyfile(FIXTURES)
    run(on_this_database, "--reuse-db", passed=5)


@pytest.mark.vendor("sqlite")
def test_the_page(on_this_database: pytest.Pytester) -> None:
    assert {language for language, _ in BLOCKS} == {"python"}
    code = "\n\n".join(code for _, code in BLOCKS)
    on_this_database.makepyfile(code)
    run(
        on_this_database,
        "--reuse-db",
        passed=len(re.findall(r"^\s*(?:async )?def test_", code, re.M)),
    )


@pytest.mark.vendor("sqlite")
def test_a_database_in_memory(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    project.makepyfile(memory=IN_MEMORY, test_fixtures=FIXTURES)
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "memory")
    monkeypatch.setenv("PYTHONPATH", os.environ["PYTHONPATH"] + os.pathsep + str(project.path))
    run(project, passed=5)


@pytest.mark.vendor("sqlite")
def test_without_pytest_django(project: pytest.Pytester) -> None:
    project.makepyfile(test_1=NOTHING_IS_IMPORTED, test_2=WITHOUT_PYTEST_DJANGO)
    run(project, "-p", "no:django", passed=4)
