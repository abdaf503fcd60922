"""What the pages of the admin have in common.

State and times are those of one moment on the database's clock, read once per request.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from django.contrib import admin
from django.contrib.admin.views.main import SEARCH_VAR, ChangeList
from django.db import connections, transaction
from django.db.models import Model, QuerySet, TextChoices
from django.forms import Script
from django.http import HttpRequest
from django.urls import NoReverseMatch, reverse
from django.utils.html import format_html
from django.utils.translation import gettext_lazy

from ..backends import backend_for
from ..conf import settings
from ..connections import in_transaction
from ..listing import with_prefix
from .paging import KeysetChangeList

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:
    ModelAdmin = admin.ModelAdmin

NOTHING = "\N{EN DASH}"


class SearchFilter(admin.SimpleListFilter):
    """Where the search looks: by default at the beginning of the name, for which there is a key."""

    title = gettext_lazy("search")
    parameter_name = "in"

    def lookups(self, request: HttpRequest, model_admin: Any) -> Sequence[tuple[str, Any]]:
        """Return the other way to search, which reads the table."""
        return [("all", gettext_lazy("anywhere, in all that is shown"))]

    def choices(self, changelist: ChangeList) -> Any:
        """Return the choices, the first by its meaning."""
        first, *others = super().choices(changelist)
        yield {**first, "display": gettext_lazy("beginning of the name")}
        yield from others

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        """Change nothing: the search itself looks at it."""


class ReadOnlyAdmin(ModelAdmin):
    """Rows that people look at and only the library writes, on the alias of the settings."""

    keys: Sequence[tuple[str, ...]]
    """The orders for which there is a unique key; see Note [Pages]."""
    name_field: str
    """What the search takes for the name."""
    unlisted: Sequence[str] = ()
    """Columns that may be large, and are read for the list only if it shows them."""

    list_per_page = 50
    show_full_result_count = False
    show_facets = admin.ShowFacets.NEVER  # each count would read the table
    change_list_template = "distlock/admin/list.html"
    change_form_template = "distlock/admin/detail.html"

    class Media:
        css = {"all": ["distlock/admin.css"]}
        js = [Script("distlock/admin.js", defer=True)]

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody: an acquisition or a job makes the row."""
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody: the row is its holder's."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Nobody: `purge_locks` deletes, and keeps the tokens growing."""
        return False

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        """Return the rows of the alias in the settings."""
        return super().get_queryset(request).using(settings().USING)

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[ChangeList]:
        """Return the list that is never counted."""
        return KeysetChangeList

    def get_ordering(self, request: HttpRequest) -> Any:
        """Return the order of the key by which a search finds its rows, or the usual one."""
        searched = request.GET.get(SEARCH_VAR) and SearchFilter.parameter_name not in request.GET
        return self.keys[-1] if searched else super().get_ordering(request)

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Any], search_term: str
    ) -> tuple[QuerySet[Any], bool]:
        """Return what begins so; or, if so chosen, what has it anywhere."""
        if SearchFilter.parameter_name in request.GET:
            return super().get_search_results(request, queryset, search_term)
        return queryset.filter(with_prefix(search_term, self.name_field)), False

    def get_object(self, request: HttpRequest, object_id: str, from_field: Any = None) -> Any:
        """Return one row, with what its page shows of other tables."""
        row = super().get_object(request, object_id, from_field)
        if row is not None:
            self.complete(request, [row])
        return row

    def complete(self, request: HttpRequest, rows: Sequence[Any]) -> None:
        """Add to the rows of one page what stands in other tables."""

    def detail_context(self, request: HttpRequest, row: Any) -> dict[str, Any]:
        """Return what the template of the detail view needs."""
        return {}

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **how: Any) -> Any:
        """Show one row."""
        context.update(self.detail_context(request, context["original"]))
        return super().render_change_form(request, context, *args, **how)

    def column(self, name: str, row: Any) -> Any:
        """Return what a column shows."""
        return getattr(self, name)(row)

    def headers(self, columns: Iterable[str]) -> list[str]:
        """Return the headers of columns."""
        return [getattr(self, column).short_description for column in columns]


def may_view(request: HttpRequest, model: type[Model]) -> bool:
    """Whether somebody may see the rows of another model."""
    opts = model._meta
    return request.user.has_perm(f"{opts.app_label}.view_{opts.model_name}")


def now_of(request: HttpRequest) -> int:
    """Return the database's clock, read once for this request."""
    if "distlock.now" not in request.META:
        connection = connections[settings().USING]
        request.META["distlock.now"] = backend_for(connection).clock(connection)
    now: int = request.META["distlock.now"]
    return now


def apart(alias: str) -> AbstractContextManager[object]:
    """Let an error in the block leave a transaction around it usable."""
    connection = connections[alias]
    return transaction.atomic(using=alias) if in_transaction(connection) else nullcontext()


def unmistakable(name: str) -> str:
    """Return a name so that it is seen if it has blanks at its ends or cannot be printed."""
    return name if name.isprintable() and name.split() == name.split(" ") else repr(name)


def badge_of(state: TextChoices, meaning: Mapping[Any, Any]) -> str:
    """Return a state as a badge."""
    return format_html(
        '<span class="distlock-badge {}" title="{}">{}</span>',
        state.value,
        meaning[state],
        state.label,
    )


def link_to(row: Model | None, site: str) -> str:
    """Return a link to the page of a row, if there is one; its name, if the site has no such page.

    site: the name of the admin site.
    """
    if row is None:
        return NOTHING
    view, name = (
        f"admin:{row._meta.app_label}_{row._meta.model_name}_change",
        unmistakable(str(row)),
    )
    try:
        address = reverse(view, args=[row.pk], current_app=site)
    except NoReverseMatch:
        return name
    return format_html('<a href="{}">{}</a>', address, name)


def labelled(label: Any, cell: str) -> str:
    """Return a cell that says what it is, where the page is too narrow for a table."""
    return format_html('<span class="distlock-label">{}</span> {}', label, cell)


def bar(share: float) -> str:
    """Return a share from 0 to 1 as a bar, for the eye: a text beside it must say the same."""
    width = round(100 * min(1.0, max(0.0, share)), 1)
    return format_html(
        '<svg class="distlock-bar" viewBox="0 0 100 4" preserveAspectRatio="none" '
        'aria-hidden="true"><rect class="whole" width="100" height="4"/>'
        '<rect class="part" width="{}" height="4"/></svg>',
        width,
    )
