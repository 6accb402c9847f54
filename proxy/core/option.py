"""A setting is a field of a frozen dataclass: its unit in its name, its default, one line of why, and its bounds."""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any,
    why: str,
    *,
    least: float = 0,
    most: float | None = None,
    above: float | None = None,
    between: tuple[float, float] | None = None,
    is_secret: bool = False,
) -> Any:
    """A field that a file, a variable or a flag may set, with bounds for numbers: inclusive all but `above`.

    A secret is kept out of `repr`.
    """
    metadata = {"why": why, "least": least, "most": most, "above": above, "between": between}
    return dataclasses.field(default=default, repr=not is_secret, metadata=metadata)
