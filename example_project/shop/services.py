"""Four hazards, each first without a lock and then with one.

Alone, each function is correct. Run by several processes, each is wrong: it reads, thinks, and
writes what it has thought, or it does again what was done. One line above it makes it right.
"""

from __future__ import annotations

import asyncio
import time

from django.db.models import F

from distlock import lock, once

from .models import Charge, Delivery, Order, Payment, Product, Report

THINKING = 0.02
"""Seconds between reading and writing. A real shop spends them on prices, rules, or a bank."""


# -- a stock counter, sold by concurrent requests ------------------------------------------------


def sell_without_lock(product_id: int) -> bool:
    """Sell one piece; `False` if there is none left."""
    product = Product.objects.get(pk=product_id)
    if product.stock < 1:
        return False
    time.sleep(THINKING)
    product.stock -= 1
    product.save()
    Order.objects.create(product=product)
    return True


# `atomic=True`: the new stock, the order and the release of the lock are one commit.
@lock("stock:{product_id}", atomic=True, wait=60)
def sell(product_id: int) -> bool:
    """Sell one piece; `False` if there is none left."""
    return sell_without_lock(product_id)


# A coroutine: while it waits, for the lock or for the supplier, it occupies no thread. It is not
# atomic, for Django has no transactions across an `await`.
@lock("stock:{product_id}", wait=60)
async def restock(product_id: int) -> None:
    """Order one piece from the supplier, and put it into stock."""
    product = await Product.objects.aget(pk=product_id)
    await asyncio.sleep(THINKING)
    product.stock += 1
    await product.asave()


# -- a payment, captured twice -------------------------------------------------------------------


def capture_without_lock(payment_id: int) -> bool:
    """Take a customer's money, once; `False` if we have it already."""
    payment = Payment.objects.get(pk=payment_id)
    if payment.captured:
        return False
    time.sleep(THINKING)
    Charge.objects.create(payment=payment, euros=payment.euros)  # the bank does as it is told
    payment.captured = True
    payment.save()
    return True


# Not atomic: no transaction should stay open while a bank thinks.
@lock("payment:{payment_id}", wait=60)
def capture(payment_id: int) -> bool:
    """Take a customer's money, once; `False` if we have it already."""
    return capture_without_lock(payment_id)


# -- an event of the supplier's, delivered by a queue more than once -----------------------------


def receive_without_receipt(event: str, product_id: int, pieces: int) -> None:
    """Put into stock what the supplier has sent."""
    product = Product.objects.get(pk=product_id)
    Delivery.objects.create(event=event, product=product, pieces=pieces)
    Product.objects.filter(pk=product_id).update(stock=F("stock") + pieces)


# The receipt commits together with the work, and whoever comes later, too, does nothing.
@once("delivery:{event}", wait=60)
def receive(event: str, product_id: int, pieces: int) -> None:
    """Put into stock what the supplier has sent."""
    receive_without_receipt(event, product_id, pieces)


# -- a nightly report, started by cron on every host ---------------------------------------------


def nightly_report_without_lock(night: str) -> bool | None:
    """Send the report of a night, unless it was sent; `False` if it was."""
    if Report.objects.filter(night=night).exists():
        return False
    time.sleep(THINKING)
    Report.objects.create(night=night, pieces_sold=Order.objects.count())
    return True


# Whoever comes second has nothing to do, and no reason to wait.
@lock("nightly-report", wait=0, on_busy="skip")
def nightly_report(night: str) -> bool | None:
    """Send the report of a night, unless it was sent; `None` if another host is at it."""
    return nightly_report_without_lock(night)
