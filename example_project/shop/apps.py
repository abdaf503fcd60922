"""The shop as a Django app."""

from __future__ import annotations

from django.apps import AppConfig


class ShopConfig(AppConfig):
    """Products, payments and a nightly report."""

    name = "example_project.shop"
    default_auto_field = "django.db.models.BigAutoField"
