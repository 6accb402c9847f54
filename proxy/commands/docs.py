"""`ibid docs [PAGE]`: the manual at a terminal. The pages are those of deploy/docs, installed as `proxy._docs`."""

from __future__ import annotations

import re
from difflib import get_close_matches
from importlib.resources import files

from proxy.core.errors import ConfigError

LIST = "index"
"""The page that lists the others."""
_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_TO_PAGE = re.compile(r"\[([^]\n]+)\]\(([\w-]+)\.md(?:#[\w-]*)?\)")
_TO_FILE = re.compile(r"\[([^]\n]+)\]\(\.\./\.\./([\w./-]+)\)")


def names() -> list[str]:
    """Every page but the list of them."""
    found = (file.name for file in files("proxy._docs").iterdir())
    return sorted(name.removesuffix(".md") for name in found if name.endswith(".md") and name != f"{LIST}.md")


def page(name: str | None) -> str:
    """The text of a page, or of the list. Raises ConfigError for an unknown one."""
    known = names()
    wanted = (name or LIST).lower().removesuffix(".md")
    if wanted not in (*known, LIST):
        near = get_close_matches(wanted, known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no page {wanted!r}; {meant}pages: {', '.join(known)}")
    return as_text(files("proxy._docs").joinpath(f"{wanted}.md").read_text(encoding="utf-8"))


def as_text(markdown: str) -> str:
    """Without comments; a link to another page says its name, unless it is what the link says already."""
    text = _COMMENT.sub("", markdown)
    text = _TO_PAGE.sub(lambda link: link[1] if link[1].lower() == link[2] else f"{link[1]} ({link[2]})", text)
    return _TO_FILE.sub(lambda link: link[1] if link[1] == link[2] else f"{link[1]} ({link[2]})", text)
