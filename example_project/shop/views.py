"""One page: the stock, the payments, and who holds which lock. And an endpoint for programs."""

from __future__ import annotations

from django.conf import settings
from django.contrib import messages
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.csrf import csrf_exempt
from django.views.decorators.http import require_POST

from distlock import LockBusy, lock
from distlock.contrib.http import idempotent
from distlock.models import DistributedLock

from . import services
from .models import Payment, Product, Run


def index(request: HttpRequest) -> HttpResponse:
    """Show everything."""
    names = DistributedLock.objects.exclude(name="").order_by("name").values_list("name", flat=True)
    holders = [holder for name in names if (holder := lock(name).holder())]
    context = {
        "products": Product.objects.order_by("name"),
        "payments": Payment.objects.order_by("customer"),
        "holders": holders,
        "runs": Run.objects.order_by("-tick", "-job", "skipped", "started")[:12],
    }
    return render(request, "shop/index.html", context)


@require_POST
def buy(request: HttpRequest, product_id: int) -> HttpResponse:
    """Sell one piece."""
    try:
        sold = services.sell(product_id)
        messages.info(request, "Sold: the piece is yours." if sold else "Sold out.")
    except LockBusy:
        messages.error(request, "Too many customers at once. Please try again.")
    return redirect("index")


@require_POST
async def restock(request: HttpRequest, product_id: int) -> HttpResponse:
    """Order one more from the supplier. Many requests may wait for that, and none has a thread."""
    try:
        await services.restock(product_id)
        messages.info(request, "Delivered.")
    except LockBusy:
        messages.error(request, "The supplier is busy. Please try again.")
    return redirect("index")


@require_POST
def capture(request: HttpRequest, payment_id: int) -> HttpResponse:
    """Take a customer's money."""
    try:
        taken = services.capture(payment_id)
        messages.info(request, "Captured." if taken else "It was captured before: nothing to do.")
    except LockBusy:
        messages.error(request, "Somebody else is capturing this payment. Please try again.")
    return redirect("index")


def client_of(request: HttpRequest) -> str:
    """Return which program asks, or "" for a stranger."""
    return settings.API_KEYS.get(request.headers.get("Api-Key", ""), "")


# No cookie says who asks, so there is nothing that another site could misuse.
@csrf_exempt
@require_POST
@idempotent(anonymous=client_of)
def authorize(request: HttpRequest) -> JsonResponse:
    """Note a customer's payment, once per `Idempotency-Key`, however often the request is sent."""
    payment = Payment.objects.create(
        customer=request.POST["customer"], euros=int(request.POST["euros"])
    )
    return JsonResponse({"payment": payment.pk}, status=201)
