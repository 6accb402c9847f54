"""An ibid configuration in the making: what is written, and what there is to say about it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from proxy.settings.sections import DEFAULT_UPSTREAMS

_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")
CLOSED: Final = "none"  # a model that nobody asks for: an upstream with no other serves nothing


class Fate(StrEnum):
    """What became of a setting."""

    TAKEN = "taken"
    RENAMED = "other name"
    LEFT = "no counterpart"


@dataclass(frozen=True, slots=True)
class Note:
    """`what`: the peer's word. `here`: what it is here, or what to do instead. Neither holds a secret."""

    fate: Fate
    what: str
    here: str


@dataclass(slots=True)
class Draft:
    """`upstreams`: settings by name, in the order in which they are asked. `keys`: environment variables that must hold
    a key before the start."""

    upstreams: dict[str, dict[str, Any]] = field(default_factory=dict)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    policies: list[dict[str, Any]] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    def take(self, what: str, section: str, name: str, value: Any, why: str = "") -> None:
        """Write a setting; `why` says what changes with it."""
        self.tables.setdefault(section, {})[name] = value
        here = f"{section}.{name} = {literal(value)}"
        self.notes.append(Note(Fate.TAKEN, what, f"{here}; {why}" if why else here))

    def rename(self, what: str, here: str) -> None:
        self.notes.append(Note(Fate.RENAMED, what, here))

    def leave(self, what: str, instead: str) -> None:
        self.notes.append(Note(Fate.LEFT, what, instead))

    def leave_others(self, where: str, given: Mapping[str, Any], known: frozenset[str]) -> None:
        """What nothing is known of."""
        for name in given:
            if name not in known:
                self.leave(f"{where}.{name}" if where else str(name), "nothing here; see `ibid docs configuration`")

    @property
    def keys(self) -> list[str]:
        found = [upstream["key_env"] for upstream in self.upstreams.values() if "key_env" in upstream]
        return list(dict.fromkeys(found))

    def close_the_others(self) -> None:
        """Built-in upstreams that were not named serve nothing, as there."""
        for name in DEFAULT_UPSTREAMS:
            self.upstreams.setdefault(name, {"models": [CLOSED]})

    def part_models(self) -> None:
        """Every upstream that is named gets its questions: a built-in one that is not named, and would take every model
        before it, is closed."""
        for name, built_in in DEFAULT_UPSTREAMS.items():
            speaking = {one: said for one, said in self.upstreams.items() if said.get("dialect") == built_in.dialect}
            taking = [one for one, said in speaking.items() if "models" not in said]
            if taking and name not in self.upstreams:
                self.upstreams[name] = {"models": [CLOSED]}
            if len(taking) > 1:
                named = ", ".join(taking)
                self.leave(f"{named}: models", f"all take every model, so {taking[0]} gets all: set `models` of each")

    def toml(self, origin: str) -> str:
        """The whole file. `origin`: what it was made from."""
        lines = [
            f"# Made by `ibid adopt` from {_CONTROL.sub(' ', origin)}.",
            "# ibid check --config FILE says what it lacks.",
        ]
        lines += [f"# export {key}=…" for key in self.keys]
        for section, values in self.tables.items():
            if not section.startswith("prices."):
                lines += ["", f"[{section}]", *_assignments(values)]
        for name, values in self.upstreams.items():
            lines += ["", f"[upstream.{_key(name)}]", *_assignments(values)]
        for section, values in self.tables.items():
            if section.startswith("prices."):
                lines += [line for name, table in values.items() for line in _priced(section, name, table)]
        for policy in self.policies:
            lines += ["", "[[policy]]", *_assignments(policy)]
        return "\n".join(lines) + "\n"


def _priced(section: str, name: str, table: Mapping[str, Any]) -> list[str]:
    return ["", f"[{section}.{_key(name)}]", *_assignments(table)]


def _assignments(values: Mapping[str, Any]) -> list[str]:
    return [f"{_key(name)} = {literal(value)}" for name, value in values.items()]


def _key(name: str) -> str:
    return name if _BARE_KEY.fullmatch(name) else literal(name)


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        writable = value.encode("utf-8", "replace").decode()  # what is half a character is none
        return json.dumps(writable, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(name)} = {literal(inner)}" for name, inner in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(inner) for inner in value) + "]"
    if isinstance(value, Decimal):
        return f"{value:f}"
    return repr(value)
