"""A small shop whose hazards are the classic ones, each with and without a lock.

python manage.py race --without-lock     wrong totals
python manage.py race                    the right ones
make demo                                web site, two workers, two beats
"""

from __future__ import annotations

from .celery import app as celery_app

__all__ = ["celery_app"]
