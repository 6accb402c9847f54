"""Types of JSON members, and which member of a body has another than it must."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Types = Mapping[str, tuple[type, ...]]

NUMBER, INTEGER, BOOLEAN, STRING, ARRAY, OBJECT = (float, int), (int,), (bool,), (str,), (list,), (dict,)
_NAMES: Final = {float: "number", int: "integer", bool: "boolean", str: "string", list: "array", dict: "object"}


def mistyped(body: Mapping[str, Any], known: Types) -> tuple[str, str] | None:
    """The first member that is of none of its types, and what it must be; null always passes, and what is unknown."""
    for name, value in body.items():
        types = known.get(name)
        if types is None or value is None:
            continue
        if not isinstance(value, types) or (type(value) is bool and bool not in types):
            return name, " or ".join(_NAMES[t] for t in types if not (t is int and float in types))
    return None
