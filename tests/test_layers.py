"""Imports go down only: edge, API, engine, store, ground. And nothing is public by accident."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import distlock
import distlock.signals

pytestmark = pytest.mark.vendor("sqlite")

LAYERS = {
    "edge": "apps admin states listing releases reruns checks doctor testing management contrib",
    "API": "arguments locks acquisitions turns leases decorators places hooks transactions atomics "
    "jobs calls outbox orders fencing",
    "engine": "keeper waiting lookout queues ears errands background connections contexts limits "
    "terms longholds",
    "store": "backends fields models migrations receipts",
    "ground": "findings events signals groups conf exceptions deadlines",
}
ORDER = list(LAYERS)
LAYER = {name: layer for layer, names in LAYERS.items() for name in names.split()}
PACKAGE = Path(distlock.__file__).parent
PUBLIC = {
    "AlreadyHeld",
    "CommitOutcomeUnknown",
    "Holder",
    "JobDuplicate",
    "Lease",
    "Lock",
    "LockBusy",
    "LockError",
    "LockLost",
    "LockStats",
    "StaleToken",
    "lock",
    "once",
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without `distlock.`."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    }


def imports(name: str, path: Path) -> set[str]:
    """The modules of ours that a module imports when it runs, lazily or not.

    What stands under TYPE_CHECKING is no import: it names a type.
    """
    package = f"distlock.{name}".split(".")
    if path.stem != "__init__":
        package = package[:-1]
    found: set[str] = set()
    for node in walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    known = modules()
    ours = set()
    for dotted in found:
        inner = dotted.removeprefix("distlock.")
        if inner == dotted:
            continue
        while inner and inner not in known:
            inner = inner.rpartition(".")[0]
        if inner:
            ours.add(inner)
    return ours - {name}


def walk(node: ast.AST) -> list[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return [inner for part in node.orelse for inner in walk(part)]
    children = [inner for child in ast.iter_child_nodes(node) for inner in walk(child)]
    return [node, *children]


def layer(name: str) -> str:
    return LAYER[name.partition(".")[0]]


@pytest.mark.parametrize("name", modules())
def test_a_module_has_a_layer_and_imports_from_it_or_below(name: str) -> None:
    assert name.partition(".")[0] in LAYER, f"put {name} into a layer, here and in the design"
    upwards = {
        other
        for other in imports(name, modules()[name])
        if ORDER.index(layer(other)) < ORDER.index(layer(name))
    }
    assert not upwards, f"{name} ({layer(name)}) imports from above: {upwards}"


def test_no_two_modules_import_each_other() -> None:
    graph = {name: imports(name, path) for name, path in modules().items()}
    while leaves := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed for name, needed in graph.items() if name not in leaves}
    assert not graph, f"these import each other in a circle: {sorted(graph)}"


def test_the_ground_imports_nothing_else_of_ours() -> None:
    for name, path in modules().items():
        if layer(name) == "ground":
            assert {layer(other) for other in imports(name, path)} <= {"ground"}


def test_sql_stands_in_the_backends_only() -> None:
    """Elsewhere no statement is spelled out, and no vendor is told from another."""
    for name, path in modules().items():
        if layer(name) == "store":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in ("vendor", "mysql_is_mariadb"), f"{name}: {node.lineno}"
        texts = [
            node.value.lstrip().split(" ")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        assert not {"SELECT", "UPDATE", "INSERT", "DELETE"} & set(texts), name


def test_the_layers_name_no_module_twice() -> None:
    names = [name for names in LAYERS.values() for name in names.split()]
    assert len(names) == len(set(names))


def test_all_is_exactly_the_public_surface() -> None:
    assert set(distlock.__all__) == PUBLIC
    assert len(distlock.__all__) == len(PUBLIC)
    assert distlock.__all__ == sorted(distlock.__all__)
    for name in distlock.__all__:
        assert getattr(distlock, name).__module__.startswith("distlock.")


def test_what_is_not_public_is_not_in_the_package_itself() -> None:
    submodules = {module.name for module in pkgutil.iter_modules(distlock.__path__)}
    others = {
        name
        for name, value in vars(distlock).items()
        if not name.startswith("_")
        and name not in submodules
        and not isinstance(value, types.ModuleType)
    }
    assert others - {"annotations"} == PUBLIC


def test_the_package_defines_nothing_itself() -> None:
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body
    kinds = {type(node) for node in body}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Assign}
    assert [node.targets[0].id for node in body if isinstance(node, ast.Assign)] == [  # type: ignore[attr-defined]
        "__all__"
    ]


def test_the_signals_are_public_in_their_module() -> None:
    assert set(distlock.signals.__all__) == {
        "job_done",
        "job_duplicate",
        "leases_renewed",
        "lock_acquired",
        "lock_busy",
        "lock_dropped",
        "lock_failed",
        "lock_lost",
        "lock_released",
    }


WITHOUT_EXTRAS = """
MONITORS = ("prometheus_client", "opentelemetry")
import sys
for absent in ("celery", "psycopg", "psycopg2", "MySQLdb", "sqlalchemy", *MONITORS):
    sys.modules[absent] = None
import django
from django.conf import settings
sqlite = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
settings.configure(INSTALLED_APPS=["distlock"], DATABASES={"default": sqlite})
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
import distlock
with distlock.lock("x") as lease:
    assert lease.token > 0
"""


def test_the_core_needs_nothing_but_django() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
