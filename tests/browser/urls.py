"""The admin, and two ways into it for a browser that can only open an address."""

from __future__ import annotations

from django.contrib import admin
from django.contrib.auth import get_user_model, login
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.test import Client
from django.urls import path, reverse

from distlock.models import DistributedLock

LOCK = "admin:distlock_distributedlock_change"
LOCKS = "admin:distlock_distributedlock_changelist"


def enter(request: HttpRequest) -> HttpResponse:
    """Log the only user in and go on to `?next=`."""
    login(request, get_user_model().objects.get())
    return HttpResponseRedirect(request.GET["next"])


def confirm(request: HttpRequest) -> HttpResponse:
    """The page that asks before a forced release of every lock."""
    client = Client(SERVER_NAME="127.0.0.1")
    client.force_login(get_user_model().objects.get())
    chosen = list(DistributedLock.objects.values_list("pk", flat=True))
    page = client.post(reverse(LOCKS), {"action": "force_release", "_selected_action": chosen})
    return HttpResponse(page.content)


urlpatterns = [
    path("admin/", admin.site.urls),
    path("enter/", enter),
    path("confirm/", confirm),
    path("favicon.ico", lambda request: HttpResponse(status=204)),
]
