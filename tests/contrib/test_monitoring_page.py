"""docs/monitoring.md runs as a project, and its dashboard and alerts know the metrics there are."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase

from distlock.contrib.prometheus import _metrics

pytestmark = pytest.mark.vendor("sqlite")

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "monitoring.md"
FOLDER = ROOT / "docs" / "monitoring"
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
RULES = (FOLDER / "alerts.yml").read_text()
METRIC = re.compile(r"distlock_[a-z_]+")
SAMPLES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
PROMTOOL = shutil.which("promtool")
promtool = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is missing: apt-get install prometheus"
)

BEFORE = """
import os, tempfile
SECRET_KEY = "x"
ROOT_URLCONF = "urls"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": os.environ["DATABASE"]}}
"""

PROJECT = """
import logging
import os
import urllib.request
import django
django.setup()
from django.core.management import call_command
call_command("migrate", verbosity=0)
call_command("check", fail_level="ERROR")

from django.test import Client
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

provider, spans = TracerProvider(), InMemorySpanExporter()
provider.add_span_processor(SimpleSpanProcessor(spans))
trace.set_tracer_provider(provider)

import shop.receivers
from distlock import lock
from distlock.signals import lock_lost
from tests.support import in_thread

with lock("acme/invoice/42") as lease:
    assert in_thread(lock("acme/invoice/42").try_acquire) is None
    page = Client().get("/metrics").content.decode()
assert 'distlock_grants_total{group="invoice"} 1.0' in page, page
assert 'distlock_busy_total{group="invoice"} 1.0' in page, page
assert 'distlock_leases_held{group="invoice"} 1.0' in page, page
told = [(span.name, dict(span.attributes)) for span in spans.get_finished_spans()]
assert len(told) == 3, told
assert "acme" not in str(told), told
lock_lost.send(sender=None, lease=lease, reason="a test")

from celery.signals import worker_init, worker_process_shutdown
import shop_celery, gunicorn_conf
worker_init.send(sender=None)
served = urllib.request.urlopen("http://localhost:%d/metrics" % PORT).read().decode()
assert 'distlock_grants_total{group="invoice"} 1.0' in served, served
worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=0)
served = urllib.request.urlopen("http://localhost:%d/metrics" % PORT).read().decode()
assert 'distlock_grants_total{group="invoice"} 1.0' in served, served
assert "distlock_leases_held{" not in served, served
"""

MODULES = {"gunicorn.conf.py": "gunicorn_conf.py", "celery.py": "shop_celery.py"}


def blocks() -> dict[str, str]:
    """The page's Python by the file that each block names in its first line."""
    files: dict[str, str] = defaultdict(str)
    for block in re.findall(r"^```python\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.M | re.S):
        files[block[0]] += block[1].replace("    ...,\n", "")
    return files


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return int(found.getsockname()[1])


def test_the_page_is_a_project_that_works(tmp_path: Path) -> None:
    assert PAGE.read_text().count("```python") == len(re.findall("```python\n# ", PAGE.read_text()))
    port = free_port()
    (tmp_path / "shop").mkdir()
    for name, text in blocks().items():
        text = BEFORE + text if name == "settings.py" else text
        text = text.replace("9100", str(port)) if name == "celery.py" else text
        (tmp_path / MODULES.get(name, name)).write_text(text)
    (tmp_path / "numbers").mkdir()
    environment = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "settings",
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "numbers"),
        "DATABASE": str(tmp_path / "database"),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROJECT.replace("PORT", str(port))],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "acme/invoice/42 was lost: a test" in done.stdout
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    assert [line["event"] for line in lines[:4]] == [
        "lock_acquired",
        "lock_busy",
        "lock_released",
        "lock_lost",
    ]
    (shown,) = re.findall(r"^```json\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    example = json.loads(shown)
    assert list(lines[1]) == list(example)
    lock = {"lock": "acme/invoice/42", "waited": lines[1]["waited"]}
    message = re.sub(r"\d\.\d+", "0.001", lines[1]["message"]).replace(lock["lock"], "invoice:42")
    assert example == {**lines[1], "lock": "invoice:42", "waited": 0.001, "message": message}


# -- metrics -------------------------------------------------------------------------------------


def metrics() -> dict[str, MetricWrapperBase]:
    """By name, as Prometheus has it; a histogram without what its samples end in."""
    found = {}
    for metric in vars(_metrics).values():
        if isinstance(metric, MetricWrapperBase):
            assert REGISTRY._names_to_collectors.get(metric._name) is metric
            found[metric._name + ("_total" if metric._type == "counter" else "")] = metric
    return found


def samples() -> dict[str, set[str]]:
    """Every time series that there may be, with its labels."""
    found = {}
    for metric in metrics().values():
        for ending in SAMPLES[metric._type]:
            labels = {*metric._labelnames, *(["le"] if ending == "_bucket" else [])}
            found[metric._name + ending] = labels
    return found


def test_the_page_has_each_metric_with_its_labels() -> None:
    rows = re.findall(r"^\| `(distlock_\w+)` \| (.*?) \|", PAGE.read_text(), re.MULTILINE)
    told = {name: tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    assert told == {name: metric._labelnames for name, metric in metrics().items()}
    assert set(METRIC.findall(PAGE.read_text())) <= {*metrics(), *samples()}


def test_no_label_can_have_any_number_of_values() -> None:
    assert {label for labels in samples().values() for label in labels} == {
        "group",
        "outcome",
        "database",
        "le",
    }


def expressions() -> list[str]:
    """What the dashboard and the rules ask Prometheus."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    rules = re.findall(r"expr: (?:\|\n((?: {10,}.*\n)+)|(.*))", RULES)
    assert len(rules) == RULES.count("- alert:")
    variables = [one["query"]["query"] for one in DASHBOARD["templating"]["list"][1:]]
    return [*panels, *variables, *map("".join, rules)]


@pytest.mark.parametrize("expression", expressions())
def test_the_dashboard_and_the_rules_ask_for_what_there_is(expression: str) -> None:
    known = samples()
    names = METRIC.findall(expression)
    assert names
    assert set(names) <= known.keys()
    grouped = {
        label.strip()
        for part in re.findall(r"by \((.*?)\)", expression)
        for label in part.split(",")
    }
    matched = set(re.findall(r"(\w+)=~?\"", expression))
    for name in names:
        assert grouped | matched <= known[name] | {"le"}, name


def test_the_dashboard_shows_what_was_asked_for() -> None:
    titles = {panel["title"] for panel in DASHBOARD["panels"]}
    assert {"Delay of acquisition", "Failure rate", "Mean hold time", "Leases held now"} <= titles
    text = json.dumps(DASHBOARD)
    for part in ("0.5,", "0.95,", "0.99,", *(name for name in metrics() if "seconds" not in name)):
        assert part in text, part
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in DASHBOARD["panels"]]
    assert len(set(places)) == len(places)


def test_each_alert_leads_to_what_to_do() -> None:
    alerts = re.findall(r"- alert: (\w+)", RULES)
    links = re.findall(r"runbook_url: docs/monitoring.md#(\w+)", RULES)
    assert links == [alert.lower() for alert in alerts]
    headings = re.findall(r"^### (Distlock\w+)$", PAGE.read_text(), re.MULTILINE)
    assert headings == alerts
    text = PAGE.read_text()
    anchors = {
        re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-")
        for one in re.findall(r"^##+ (.*)$", text, re.M)
    }
    assert set(re.findall(r"\]\(#(.*?)\)", text)) <= anchors


def run_promtool(*args: str, cwd: Path) -> Any:
    return subprocess.run(
        [str(PROMTOOL), *args], cwd=cwd, capture_output=True, text=True, timeout=60
    )


@promtool
def test_promtool_accepts_the_rules() -> None:
    done = run_promtool("check", "rules", "alerts.yml", cwd=FOLDER)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{RULES.count('- alert:')} rules found" in done.stdout


@promtool
def test_each_alert_fires_when_it_should(tmp_path: Path) -> None:
    tests = (ROOT / "tests" / "alerts_test.yml").read_text()
    assert set(re.findall(r"alertname: (\w+)\n +exp", tests)) == set(
        re.findall(r"- alert: (\w+)", RULES)
    )
    (tmp_path / "alerts.yml").write_text(RULES)
    (tmp_path / "alerts_test.yml").write_text(tests)
    done = run_promtool("test", "rules", "alerts_test.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_understands_what_the_dashboard_asks(tmp_path: Path) -> None:
    asked = [
        expression.replace("$__rate_interval", "5m").replace("$group", ".*")
        for expression in expressions()
        if "label_values" not in expression
    ]
    rules = [{"record": f"asked:{n}", "expr": expression} for n, expression in enumerate(asked)]
    text = json.dumps({"groups": [{"name": "dashboard", "rules": rules}]})
    (tmp_path / "asked.yml").write_text(text)  # JSON is YAML
    done = run_promtool("check", "rules", "asked.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
