"""What an admin token may do: three roles, each of which may all that the one before it may."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class Role(IntEnum):
    """In ascending order, so that `>=` reads as "may at least"."""

    STATS = 1  # numbers without text: stats, metrics, savings
    AUDITOR = 2  # reads everything, says which answers were wrong
    ADMIN = 3

    def __str__(self) -> str:
        return self.name.lower()


class Token(NamedTuple):
    """One more admin token beside the first, whose name is FIRST."""

    name: str
    role: Role
    secret: str


class Who(NamedTuple):
    """Whose token a request came with."""

    name: str
    role: Role


FIRST = Who("admin", Role.ADMIN)
