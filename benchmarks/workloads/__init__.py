"""What is measured: each workload is a function of a ``Bench``, by name, in the order of a run."""

from __future__ import annotations

from collections.abc import Callable

from .base import Bench, Table
from .contended import hand_over, waiting
from .keeping import renewals
from .profile import gaps, layers, steps
from .tables import churn, million, purge
from .uncontended import latency, throughput

WORKLOADS: dict[str, Callable[[Bench], Table]] = {
    "latency": latency,
    "throughput": throughput,
    "hand-over": hand_over,
    "waiting": waiting,
    "churn": churn,
    "million": million,
    "purge": purge,
    "renewals": renewals,
    "layers": layers,
    "steps": steps,
    "gaps": gaps,
}
