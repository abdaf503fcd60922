"""Several processes that do the same thing at the same moment. Used by `manage.py race`."""

from __future__ import annotations

import multiprocessing
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from typing import Any

LIMIT = 120.0
"""Seconds until a race that hangs is given up."""


@dataclass(frozen=True)
class Race:
    """What the processes do: the ids of a product and a payment, a night, an event, and how."""

    product: int
    payment: int
    night: str
    event: str
    pieces: int
    sales: int
    locked: bool


def run(race: Race, processes: int) -> None:
    """Let processes race. Raises `RuntimeError` if one of them fails."""
    # Spawned and not forked: nobody inherits a connection.
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    racers: list[Any] = [
        context.Process(target=_racer, args=(race, barrier), daemon=True) for _ in range(processes)
    ]
    for racer in racers:
        racer.start()
    try:
        for racer in racers:
            racer.join(LIMIT)
        if failed := sum(racer.exitcode != 0 for racer in racers):
            raise RuntimeError(f"{failed} of {processes} processes failed or did not end.")
    finally:
        for racer in racers:
            racer.kill()
            racer.join()


def _racer(race: Race, barrier: Barrier) -> None:
    import django

    django.setup()
    from . import services

    if race.locked:
        sell, capture, report = services.sell, services.capture, services.nightly_report
        receive = services.receive
    else:
        sell = services.sell_without_lock
        capture = services.capture_without_lock
        report = services.nightly_report_without_lock
        receive = services.receive_without_receipt
    barrier.wait(LIMIT)
    for _ in range(race.sales):
        sell(race.product)
    barrier.wait(LIMIT)
    capture(race.payment)
    barrier.wait(LIMIT)
    report(race.night)
    barrier.wait(LIMIT)
    receive(race.event, race.product, race.pieces)
