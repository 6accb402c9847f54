"""`ibid docs [PAGE]`: the manual at a terminal."""

from __future__ import annotations

import re
from difflib import get_close_matches

from proxy.admin.manual import LIST, markdown, names
from proxy.core.errors import ConfigError

_COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
_TO_PAGE = re.compile(r"\[([^]\n]+)\]\(([\w-]+)\.md(?:#[\w-]*)?\)")
_TO_FILE = re.compile(r"\[([^]\n]+)\]\(\.\./\.\./([\w./-]+)\)")


def page(name: str | None) -> str:
    """The text of a page, or of the list. Raises ConfigError for an unknown one."""
    known = names()
    wanted = (name or LIST).lower().removesuffix(".md")
    if (found := markdown(wanted)) is None:
        near = get_close_matches(wanted, known, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"there is no page {wanted!r}; {meant}pages: {', '.join(known)}")
    return as_text(found)


def as_text(source: str) -> str:
    """Without comments; a link to another page says its name, unless it is what the link says already."""
    text = _COMMENT.sub("", source)
    text = _TO_PAGE.sub(lambda link: link[1] if link[1].lower() == link[2] else f"{link[1]} ({link[2]})", text)
    return _TO_FILE.sub(lambda link: link[1] if link[1] == link[2] else f"{link[1]} ({link[2]})", text)
