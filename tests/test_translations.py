"""Every text of the admin and the models is there in each language, and compiled."""

from __future__ import annotations

import ast
import gettext
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
from django.template.base import Lexer, TokenType
from django.utils import translation

import distlock
from distlock.models import DistributedLock, Job

pytestmark = pytest.mark.vendor("sqlite")

PACKAGE = Path(distlock.__file__).parent
LANGUAGES = ("de", "ko")
MARKS = {"_", "gettext", "gettext_lazy", "ngettext"}
BLOCK = re.compile(r"""translate (["'])(.*?)\1""")
ENTRY = re.compile(r'^msgid "(.+)"\n(?:msgid_plural "(.+)"\n)?((?:msgstr.*\n?)+)', re.MULTILINE)


def texts() -> set[str]:
    """What the code and the templates mark for translation."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in MARKS:
                for argument in node.args[:2]:
                    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                        found.add(argument.value)
    for path in PACKAGE.rglob("*.html"):
        for token in Lexer(path.read_text()).tokenize():
            if token.token_type is TokenType.BLOCK and token.contents.startswith("translate"):
                match = BLOCK.match(token.contents)
                assert match, f"{path.name}: {token.contents}"
                found.add(match[2])
            assert not token.contents.startswith("blocktranslate"), "not read by this test"
    return found


def entries(language: str) -> dict[str, list[str]]:
    """The texts of a language, by each text in English; of one with a plural, by both."""
    source = (PACKAGE / "locale" / language / "LC_MESSAGES" / "django.po").read_text()
    assert "fuzzy" not in source
    assert "#~" not in source
    found = {}
    for one, many, block in ENTRY.findall(source):
        said = re.findall(r'^msgstr(?:\[\d\])? "(.*)"$', block, re.MULTILINE)
        found.update({plain(text): [plain(each) for each in said] for text in (one, many) if text})
    return found


def plain(text: str) -> str:
    return text.replace('\\"', '"').replace("\\\\", "\\")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_text_is_translated(language: str) -> None:
    told = entries(language)
    assert texts() - told.keys() == set(), "run makemessages in distlock/, translate, compile"
    assert told.keys() - texts() == set(), "nothing in the code says so any more"
    assert [text for text, said in told.items() if not all(said)] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_filled_in_is_the_same(language: str) -> None:
    holes = re.compile(r"%\(\w+\)[rs]|%[sd]|\{\}")
    for text, said in entries(language).items():
        for each in said:
            assert sorted(holes.findall(each)) == sorted(holes.findall(text)), each


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_is_compiled_is_what_is_written(language: str) -> None:
    with (PACKAGE / "locale" / language / "LC_MESSAGES" / "django.mo").open("rb") as file:
        compiled = gettext.GNUTranslations(file)
    for text, said in entries(language).items():
        assert compiled.gettext(text) in {text, *said}
        assert compiled.gettext(text) == said[0] or len(said) > 1 or "%d" in text


@pytest.mark.parametrize("model", [DistributedLock, Job])
@pytest.mark.parametrize("language", LANGUAGES)
def test_every_column_has_a_name_in_it(language: str, model: type) -> None:
    told = entries(language)
    with translation.override(None):
        names = [str(field.verbose_name) for field in model._meta.fields if not field.primary_key]  # type: ignore[attr-defined]
    assert set(names) <= told.keys()
    with translation.override(language):
        assert (
            str(model._meta.verbose_name)
            in told[  # type: ignore[attr-defined]
                {"DistributedLock": "lock", "Job": "job"}[model.__name__]
            ]
        )


def test_what_is_no_python_is_in_the_package() -> None:
    setup = ConfigParser()
    setup.read(PACKAGE.parent / "setup.cfg")
    patterns = setup["options.package_data"]["distlock"].split()
    packed = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    others = {
        path
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert others - packed == set()
