"""The lock's name for a job that was not given one: the job's name and its arguments.

One spelling per call: by position, by keyword or by default, with sorted keys. A name that is too
long keeps its readable beginning and ends in a hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, time
from typing import Any

from django.core.serializers.json import DjangoJSONEncoder

from ..arguments import LONGEST_NAME


class CanonicalEncoder(DjangoJSONEncoder):
    """Django's, which cuts moments to milliseconds: two of them must not share a lock."""

    def default(self, o: Any) -> Any:
        """Return what stands for an object that is not JSON."""
        return o.isoformat() if isinstance(o, datetime | time) else super().default(o)


def canonical_name(job: str, arguments: Mapping[str, Any], longest: int = LONGEST_NAME) -> str:
    """Return a name for a job and its bound arguments, defaults applied.

    Raises `TypeError` that names the job and the argument for what has no JSON form.
    """
    if not arguments:
        return fitting(job, longest)
    pairs = (
        f"{json.dumps(key)}:{_canonical(job, key, arguments[key])}" for key in sorted(arguments)
    )
    return fitting(f"{job}:{{{','.join(pairs)}}}", longest)


def _canonical(job: str, argument: str, value: Any) -> str:
    try:
        return json.dumps(value, cls=CanonicalEncoder, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"There is no default key for {job}: its argument {argument!r} is not JSON ({error}). "
            "Pass key=..., for instance with the {fields} that matter."
        ) from error


def fitting(name: str, longest: int = LONGEST_NAME) -> str:
    """Return a name that is at most that long, and still its own."""
    if len(name) <= longest:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()
    return f"{name[: longest - len(digest) - 1]}#{digest}"
