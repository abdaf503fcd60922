"""Run the benchmarks: ``make bench``, or ``python -m benchmarks``.

    python -m benchmarks --quick                           all workloads, small: ten minutes
    python -m benchmarks --only latency --only hand-over   some of them
    python -m benchmarks --contender pg-distlock           some contenders, and what they are
                                                           compared with
    python -m benchmarks --report FILE --markdown docs/performance.md --plot docs/performance.png
                                                           the tables of an earlier run

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
    parser.add_argument(
        "--report",
        type=Path,
        action="append",
        help="do not run: read this result; the workloads of a second one take the place of its",
    )
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
    """Make the tables of all contenders; for each that cannot run, the reason."""
    missing = {}
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
    for key, why in missing.items():
        say(f"not run: {key}: {why}")
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
        bench = Bench(stands, [key for key in keys if key not in missing], options.quick)
        results: dict[str, Any] = {
            "about": described,
            "missing": missing,
            "failures": bench.failures,
            "workloads": {},
        }
        for name in options.only or WORKLOADS:
            begun = time.monotonic()
            say(f"{name} ...")
            try:
                results["workloads"][name] = WORKLOADS[name](bench)
            except Exception as error:  # what was measured before and after it is kept
                bench.fail(f"{name}: {type(error).__name__}: {error}", ours=True)
            say(f"{name}: {time.monotonic() - begun:.0f} s")
            path.write_text(json.dumps(results, indent=1) + "\n")
    return results, not bench.bad


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several runs: each workload as the last one has it."""
    whole = {key: dict(value) for key, value in runs[-1].items() if key != "failures"}
    whole["workloads"] = {name: table for run in runs for name, table in run["workloads"].items()}
    failures = [failure for run in runs for failure in run["failures"]]
    if len(runs) > 1:
        whole["about"]["runs"] = f"{len(runs)}, each workload from the last that had it"
    return {**whole, "failures": failures}


def main(argv: list[str]) -> int:
    options = parse(argv)
    RESULTS.mkdir(exist_ok=True)
    good = True
    if options.report:
        results = merged([json.loads(file.read_text()) for file in options.report])
        path = options.report[-1]
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
