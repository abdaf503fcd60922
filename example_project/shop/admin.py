"""The shop's tables in the admin; the locks bring their own page."""

from __future__ import annotations

from django.contrib import admin

from .models import Order, Payment, Product, Report

admin.site.register([Order, Payment, Product, Report])
