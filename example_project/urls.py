"""The shop and the admin."""

from __future__ import annotations

from django.contrib import admin
from django.urls import path

from .shop import views

urlpatterns = [
    path("", views.index, name="index"),
    path("buy/<int:product_id>/", views.buy, name="buy"),
    path("restock/<int:product_id>/", views.restock, name="restock"),
    path("capture/<int:payment_id>/", views.capture, name="capture"),
    path("api/payments/", views.authorize, name="authorize"),
    path("admin/", admin.site.urls),
]
