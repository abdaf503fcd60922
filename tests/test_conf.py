from __future__ import annotations

import dataclasses
import math
from datetime import timedelta
from typing import Any

import pytest
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.test import override_settings

from distlock import lock
from distlock.conf import Settings, settings

pytestmark = pytest.mark.vendor("sqlite")


def found(value: Any) -> list[tuple[str | None, str]]:
    """What `manage.py check` says about a setting."""
    with override_settings(DISTLOCK=value, DEBUG=True):  # else SQLite is a warning
        return [
            (message.id, str(message.msg))
            for message in checks.run_checks()
            if (message.id or "").startswith("distlock.")
        ]


def test_without_a_setting_the_defaults_hold_and_nothing_is_said() -> None:
    assert settings() == Settings("default", 30, 10, True, True, 30 * 24 * 3600)
    assert found({}) == []


def test_a_setting_takes_the_place_of_its_default() -> None:
    given = {
        "USING": "other",
        "TTL": timedelta(minutes=1),
        "WAIT": 0.5,
        "RENEW": False,
        "CRASH_SAFE": False,
        "PURGE_AFTER": 0,
        "GROUP": str.upper,
        "TRACE_NAMES": False,
    }
    assert found(given) == []
    with override_settings(DISTLOCK=given):
        assert dataclasses.asdict(settings()) == given
    assert settings() == Settings()


@pytest.mark.parametrize("wait", [None, 0, 2, 2.5, timedelta(seconds=3)])
def test_a_wait_may_be_any_duration_or_none(wait: Any) -> None:
    assert found({"WAIT": wait}) == []
    with override_settings(DISTLOCK={"WAIT": wait}):
        assert wait == settings().WAIT


def test_an_unknown_key_is_error_e001_and_the_known_ones_are_named() -> None:
    [(code, text)] = found({"TIMEOUT": 5})
    assert code == "distlock.E001"
    assert text == (
        "DISTLOCK has an unknown key 'TIMEOUT'. "
        "It knows USING, TTL, WAIT, RENEW, CRASH_SAFE, PURGE_AFTER, GROUP, TRACE_NAMES."
    )


@pytest.mark.parametrize("key", ["ttl", 5, None, ("TTL",)], ids=repr)
def test_a_key_is_known_only_as_it_is_written(key: Any) -> None:
    [(code, text)] = found({key: 5})
    assert code == "distlock.E001"
    assert repr(key) in text


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("USING", 5, "must be a database alias, not 5."),
        ("USING", None, "must be a database alias, not None."),
        ("USING", "replica", "'replica' is not in DATABASES."),
        ("TTL", 0, "TTL must be greater than 0, not 0."),
        ("TTL", -1, "TTL must be greater than 0, not -1."),
        ("TTL", None, "TTL must be a number of seconds or a timedelta, not NoneType."),
        ("TTL", "30", "TTL must be a number of seconds or a timedelta, not str."),
        ("TTL", True, "TTL must be a number of seconds or a timedelta, not bool."),
        ("TTL", math.nan, "TTL must be greater than 0, not nan."),
        ("TTL", math.inf, "TTL must be at most ten years (315360000), not inf."),
        ("WAIT", -0.5, "WAIT must be 0 or greater, not -0.5."),
        ("WAIT", timedelta(seconds=-1), "WAIT must be 0 or greater"),
        ("WAIT", False, "WAIT must be a number of seconds or a timedelta, not bool."),
        ("WAIT", [1], "WAIT must be a number of seconds or a timedelta, not list."),
        ("RENEW", 1, "must be True or False, not 1."),
        ("RENEW", "no", "must be True or False, not 'no'."),
        ("RENEW", None, "must be True or False, not None."),
        ("CRASH_SAFE", 0, "must be True or False, not 0."),
        ("PURGE_AFTER", -1, "PURGE_AFTER must be 0 or greater, not -1."),
        ("GROUP", 5, "must be a function of a lock's name, or the dotted path of one, not 5."),
        ("GROUP", "", "cannot be imported from '': "),
        ("GROUP", "tests.nowhere.group", "cannot be imported from 'tests.nowhere.group': No mod"),
        ("GROUP", "tests.support.nothing", "cannot be imported from 'tests.support.nothing': "),
        ("GROUP", "tests.support.LIMIT", "must be a function of a lock's name"),
        ("TRACE_NAMES", 1, "must be True or False, not 1."),
        ("PURGE_AFTER", None, "PURGE_AFTER must be a number of seconds or a timedelta"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_wrong_value_is_error_e002_that_names_the_key_and_the_remedy(
    key: str, value: Any, said: str
) -> None:
    [(code, text)] = found({key: value})
    assert code == "distlock.E002"
    assert text.startswith(f"DISTLOCK['{key}'] ")
    assert said in text


@pytest.mark.parametrize("value", [None, [], "TTL=30", 5, {"TTL"}], ids=repr)
def test_what_is_no_dict_is_error_e002(value: Any) -> None:
    [(code, text)] = found(value)
    assert code == "distlock.E002"
    assert text == f"DISTLOCK must be a dict, not {type(value).__name__}."


def test_every_wrong_entry_is_told_at_once() -> None:
    codes = [code for code, _ in found({"TTL": 0, "WAIT": -1, "NOPE": 1, "RENEW": 2})]
    assert sorted(map(str, codes)) == ["distlock.E001", *["distlock.E002"] * 3]


def test_a_lock_refuses_settings_that_were_not_checked_with_the_same_words() -> None:
    with (
        override_settings(DISTLOCK={"TTL": 0}),
        pytest.raises(
            ImproperlyConfigured, match=r"DISTLOCK\['TTL'\] TTL must be greater than 0, not 0"
        ),
    ):
        lock("x").try_acquire()
    with (
        override_settings(DISTLOCK={"TLL": 5}),
        pytest.raises(ImproperlyConfigured, match="unknown key 'TLL'"),
    ):
        lock("x").acquire()


@pytest.mark.django_db(transaction=True)
def test_a_lock_that_says_nothing_follows_the_settings_of_the_moment() -> None:
    described = lock("x")
    for ttl in (5, timedelta(minutes=2)):
        with override_settings(DISTLOCK={"TTL": ttl, "RENEW": False}):
            with described as lease:
                length = lease.expires_at - lease.acquired_at
                assert length == (ttl if isinstance(ttl, timedelta) else timedelta(seconds=ttl))


@pytest.mark.django_db(transaction=True)
def test_an_argument_goes_before_the_settings() -> None:
    with override_settings(DISTLOCK={"TTL": 5, "USING": "other"}):
        with lock("x", ttl=60, using="default") as lease:
            assert lease.expires_at - lease.acquired_at == timedelta(seconds=60)
