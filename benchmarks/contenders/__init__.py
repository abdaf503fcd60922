"""All contenders by their key, in the order of the tables. A file holds one family."""

from __future__ import annotations

from . import elsewhere, handwritten, ours, peers, raw
from .base import Contender

_families = (raw, ours, handwritten, peers, elsewhere)
_order = ["postgresql", "mariadb", "redis", "redis-always"]

CONTENDERS: dict[str, type[Contender]] = {
    each.key: each
    for server in _order
    for family in _families
    for each in family.CONTENDERS
    if each.server == server
}
REFERENCES = {
    "postgresql": "pg-raw-lease",
    "mariadb": "mariadb-raw-lease",
    "redis": "pg-raw-lease",
    "redis-always": "pg-raw-lease",
}
"""What a ratio is taken against, by server: the raw lease; for Redis that of PostgreSQL."""
