"""Run the benchmarks: ``make bench``, or ``python -m benchmarks``.

    python -m benchmarks --quick                           all workloads, small
    python -m benchmarks --only latency --only hand-over   some of them
    python -m benchmarks --contender pg-distlock           some contenders, and what they are
                                                           compared with
    python -m benchmarks --report FILE --markdown docs/performance.md --plot docs/performance.png
                                                           the tables of an earlier run

Only a whole run is for a page: what an earlier run said of a workload is not taken over.

It starts private servers, prints ratios, and leaves JSON, markdown and a picture in
``benchmarks/results``. What cannot run here is named with its reason. The exit status is 1 if two
held one lock, or if distlock failed to do what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import sys
import time
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .contenders import CONTENDERS, REFERENCES
from .plot import draw
from .processes import ROOT, Failed, run
from .report import markdown, write
from .servers import STANDS, Stand, started
from .workloads import WORKLOADS
from .workloads.base import Bench, say

RESULTS = ROOT / "benchmarks" / "results"
NOT_ASKED = "not asked for"
UNFINISHED = "the run ended before"


def parse(argv: list[str]) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", action="append", choices=list(WORKLOADS), help="repeatable")
    parser.add_argument("--contender", action="append", choices=list(CONTENDERS))
    parser.add_argument("--quick", action="store_true", help="less of everything")
    parser.add_argument("--report", type=Path, help="do not run: read this result")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    parser.add_argument("--plot", type=Path, help="write the picture to this file, too")
    return parser.parse_args(argv)


def wanted(chosen: list[str] | None) -> list[str]:
    """The contenders to run, in the order of the tables, references included."""
    if not chosen:
        return list(CONTENDERS)
    needed = set(chosen) | {REFERENCES[CONTENDERS[key].server] for key in chosen}
    return [key for key in CONTENDERS if key in needed]


def prepared(keys: list[str], stands: dict[str, Stand], absent: dict[str, str]) -> dict[str, str]:
    """Make the tables of these contenders; for each that does not run, the reason."""
    missing = {key: NOT_ASKED for key in CONTENDERS if key not in keys}
    for key in keys:
        server = CONTENDERS[key].server
        if server in absent:
            missing[key] = absent[server]
            continue
        try:
            found = run(key, stands[server].url, "prepare")
            if "missing" in found:
                missing[key] = found["missing"]
        except Failed as failure:
            missing[key] = str(failure)
    for key in missing.keys() & set(keys):
        say(f"not run: {key}: {missing[key]}")
    return missing


def about(stands: dict[str, Stand], quick: bool) -> dict[str, str]:
    packages = ["Django", "psycopg", "mysqlclient", "redis", "tooz"]
    packages += ["django-pglock", "django-mysql", "django-db-mutex"]
    return {
        "date": datetime.now(tz=timezone.utc).strftime("%Y-%m-%d"),
        "run": "quick" if quick else "full",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "load before the run": f"{os.getloadavg()[0]:.1f}",
        "servers": ", ".join(stand.title for stand in stands.values()),
        "packages": ", ".join(
            [f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)]
        ),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "(absent)"


def measure(options: argparse.Namespace, path: Path) -> tuple[dict[str, Any], bool]:
    """Run the workloads; the results are saved after each. Also: whether all was well."""
    keys = wanted(options.contender)
    servers = [s for s in STANDS if any(CONTENDERS[key].server == s for key in keys)]
    with started(servers) as (stands, absent):
        described = about(stands, options.quick)
        missing = prepared(keys, stands, absent)
        names = options.only or list(WORKLOADS)
        bench = Bench(stands, [key for key in keys if key not in missing], options.quick)
        results: dict[str, Any] = {
            "about": described,
            "missing": missing,
            "skipped": {name: UNFINISHED if name in names else NOT_ASKED for name in WORKLOADS},
            "failures": bench.failures,
            "workloads": {},
        }
        start = time.monotonic()
        for name in names:
            begun = time.monotonic()
            say(f"{name} ...")
            measure_one(bench, name, results)
            say(f"{name}: {time.monotonic() - begun:.0f} s")
            described["minutes"] = f"{(time.monotonic() - start) / 60:.0f}"
            path.write_text(json.dumps(results, indent=1) + "\n")
    return results, not bench.bad


def measure_one(bench: Bench, name: str, results: dict[str, Any]) -> None:
    """Run a workload. If it fails, what was measured before and after it is kept."""
    try:
        results["workloads"][name] = WORKLOADS[name](bench)
        del results["skipped"][name]
    except Exception as error:
        results["skipped"][name] = "failed"
        bench.fail(f"{name}: {type(error).__name__}: {error}", ours=True)


def main(argv: list[str]) -> int:
    options = parse(argv)
    RESULTS.mkdir(exist_ok=True)
    good = True
    if options.report:
        path = options.report
        results = json.loads(path.read_text())
    else:
        stamp = datetime.now(tz=timezone.utc).strftime("%Y%m%d-%H%M%S")
        path = RESULTS / f"{stamp}{'-quick' if options.quick else ''}.json"
        results, good = measure(options, path)
    text = markdown(results)
    print(text, flush=True)
    own = set() if options.report else {path}
    for target in {*(p.with_suffix(".md") for p in own), options.markdown} - {None}:
        write(text, target)
    try:
        for target in {*(p.with_suffix(".png") for p in own), options.plot} - {None}:
            draw(results, target)
    except ImportError as error:
        say(f"no picture: {error}")
    say(f"results: {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    return 0 if good else 1


def stop(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
