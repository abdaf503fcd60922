"""Fencing for rows that the lock's own transaction cannot protect: those of another database.

Import it from a `models.py`; it defines an abstract model, so it needs Django's apps.

# Note [Fencing]
A holder may be paused, lose its lock, and wake up to write after its successor. What can stop it
is the receiver: it keeps the token of the last write beside the data, and takes no write from an
older one. That comparison has to be part of the write,

    UPDATE .. SET .., fencing_token = 9 WHERE id = 1 AND fencing_token <= 9

because a value that was read before may be old by the time of the write. A statement that waits
for the row lock of a newer holder compares again after that one's commit; on PostgreSQL above READ
COMMITTED it fails instead. Equal tokens pass: one holder writes many times.

Two things would slip past the comparison, so they are refused or made impossible here:

- Django moves the conditions of an update over several tables into a subquery, or reads the keys
  first and updates those: then nothing is compared again (tried: the stale write gets through).
- An ordinary `save()` writes every column as it was read, and would set the token back. The field
  writes itself instead, so that only a fenced write moves it.

What no receiver can see is what a write is based on. A holder that reads, computes and writes has
to raise the token *before* it reads, or an older one can still write in between.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from django.db import connections, models, router, transaction
from django.db.models import F

from .connections import in_transaction
from .exceptions import StaleToken
from .leases import Lease

__all__ = ["FencedModel", "FencedQuerySet", "FencingTokenField"]

M = TypeVar("M", bound=models.Model)

if TYPE_CHECKING:
    BigIntegerField = models.BigIntegerField[int, int]
else:
    BigIntegerField = models.BigIntegerField


class FencingTokenField(BigIntegerField):
    """The token of the last fenced write, 0 before the first. Never write it by hand."""

    def pre_save(self, model_instance: models.Model, add: bool) -> Any:
        """Keep what the row has, whatever the instance remembers; see Note [Fencing]."""
        return super().pre_save(model_instance, add) if add else F(self.attname)


class FencedQuerySet(models.QuerySet[M]):
    """A queryset that can also write under a fence. Everything else in it is unfenced."""

    def fenced_update(self, lease: Lease | int, /, **values: Any) -> int:
        """Update all rows, and raise their token, if none was written with a newer token.

        `lease` is the lease that protects these rows, or its token. Without values only the token
        is raised: then no older holder can write these rows any more, nor can anybody else before
        the open transaction, if there is one, has ended. Returns how many rows matched; 0 means
        that there are none.

        Raises `StaleToken` if one of them was written with a newer token; then none is changed,
        and an open transaction can only be rolled back. `LockLost`, without asking the database,
        if the lease is known to be lost; `TypeError` for filters or columns of other tables.
        """
        token, name = _token(lease)
        fresh = self.filter(fencing_token__lte=token)
        if fresh.query.count_active_tables() > 1 or _several_tables(self.model):
            raise TypeError(
                "fenced_update() needs filters and columns of one table: Django would look up the "
                "rows of a join first, and then the database cannot compare their token as it "
                "writes. Filter by pk__in, and fence the table that has the token."
            )
        self._for_write = True
        self._result_cache = None
        with _all_or_nothing(self.db):
            updated = fresh.using(self.db).update(**values, fencing_token=token)
            stale = self.using(self.db).filter(fencing_token__gt=token).order_by()
            # A locking read sees what the update saw, also where a plain one has a snapshot.
            seen = max(stale.select_for_update().values_list("fencing_token", flat=True), default=0)
            if seen:
                raise _stale(self.model, token, name, seen)
        return updated


class FencedModel(models.Model):
    """A row that remembers the newest token that has written it, and refuses older ones.

    Only `fenced_update()` and `fenced_save()` compare. Any other write is let through and leaves
    the token as it is. Deleting a row forgets its token: mark it instead, if it may come back.
    All fenced writes of a row must belong to locks of one name: tokens of two do not compare.
    """

    fencing_token = FencingTokenField(default=0, db_default=0, editable=False)

    objects = FencedQuerySet.as_manager()

    class Meta:
        abstract = True

    def fenced_save(
        self,
        lease: Lease | int,
        /,
        *,
        using: str | None = None,
        update_fields: Iterable[str] | None = None,
    ) -> None:
        """Save, and raise the row's token, if it was not written with a newer token.

        Calls `save()` once the row is locked in a transaction. Raises what `fenced_update()` does;
        `DoesNotExist` if there is no row and `update_fields` is given. Without, it is inserted:
        `IntegrityError` if somebody else was quicker, and then a second try says who is newer.
        """
        token, _ = _token(lease)
        if _several_tables(type(self)):
            raise TypeError(
                "fenced_save() needs a model of one table. Raise the token of the table that has "
                "it with fenced_update(), then save(), in one transaction."
            )
        using = using or router.db_for_write(type(self), instance=self)
        rows: FencedQuerySet[Any] = FencedQuerySet(type(self), using=using).filter(pk=self.pk)
        with _all_or_nothing(using):
            if self.pk is not None and rows.fenced_update(lease):
                self.fencing_token = token
                self.save(using=using, force_update=True, update_fields=update_fields)
            elif update_fields is not None:
                raise type(self).DoesNotExist(f"There is no {self._meta.label} {self.pk!r}.")
            else:
                self.fencing_token = token
                self.save(using=using, force_insert=True)  # an update could hit a newer row


def _token(lease: Lease | int) -> tuple[int, str | None]:
    """Return the token, and the lock's name if it is known."""
    if isinstance(lease, Lease):
        lease.check()
        return lease.token, lease.name
    if isinstance(lease, bool) or not isinstance(lease, int):
        raise TypeError(f"lease must be a Lease or its token, not {type(lease).__name__}.")
    if not 0 < lease <= BigIntegerField.MAX_BIGINT:
        raise ValueError(f"lease must be a token, greater than 0 and below 2**63, not {lease}.")
    return lease, None


def _all_or_nothing(using: str) -> transaction.Atomic:
    """Return a block that, if it fails, leaves the caller's own transaction only a rollback.

    A savepoint would let a swallowed error commit the rest. What `TestCase` opened is no
    transaction of the caller's.
    """
    return transaction.atomic(using=using, savepoint=not in_transaction(connections[using]))


def _several_tables(model: type[models.Model]) -> bool:
    """Whether the model inherits columns from another table."""
    return bool((model._meta.concrete_model or model)._meta.parents)


def _stale(model: type[models.Model], token: int, name: str | None, seen: int) -> StaleToken:
    of = "" if name is None else f" of the lock {name!r}"
    return StaleToken(
        f"The token {token}{of} is older than {seen}, which has written {model._meta.label}: a "
        "later holder is at work. Nothing was written; do not try again with this token.",
        name=name,
        token=token,
        seen=seen,
    )
