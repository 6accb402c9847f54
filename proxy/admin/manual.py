"""The manual's pages: those of deploy/docs, installed as `proxy._docs`. Read by `ibid docs` and by the dashboard."""

from __future__ import annotations

from importlib.resources import files

LIST = "index"
"""The page that lists the others."""


def names() -> list[str]:
    """Every page but the list of them."""
    found = (file.name for file in files("proxy._docs").iterdir())
    return sorted(name.removesuffix(".md") for name in found if name.endswith(".md") and name != f"{LIST}.md")


def markdown(name: str) -> str | None:
    """A page as it was written; None where there is none of this name."""
    if name not in (LIST, *names()):
        return None
    return files("proxy._docs").joinpath(f"{name}.md").read_text(encoding="utf-8")
