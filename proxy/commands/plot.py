"""Curves of hit rate against error as one SVG file: no library, no script, readable without colour."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Final

WIDTH, HEIGHT, MARGIN = 460, 300, 48
MOST_ERROR: Final = 0.10
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.axis{stroke:#888}.ibid{stroke:#0a5;fill:none;stroke-width:2}"
    ".fixed{stroke:#777;fill:none;stroke-dasharray:5 3}.peer{fill:#c33}.dot{fill:#0a5}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}}"
)


def svg(results: Sequence[Mapping[str, Any]]) -> str:
    """One panel for each stream: ibid over its budgets, the best fixed similarity in hindsight, peers' rules."""
    streams = [found for found in results if found["kind"] == "stream"]
    panels = [_panel(found, i * HEIGHT) for i, found in enumerate(streams)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {max(1, len(streams)) * HEIGHT}" role="img" '
        f'aria-label="hit rate against share of wrong hits"><style>{_STYLE}</style>{"".join(panels)}</svg>\n'
    )


def _panel(found: Mapping[str, Any], top: int) -> str:
    most = max(
        [row["hit_rate"] for row in (*found["budgets"], *found["static"])]
        + [peer["hit_rate"] for peer in found["peers"] if _error(peer) <= MOST_ERROR]
        + [0.05]
    )

    def place(error: float, hit_rate: float) -> tuple[float, float]:
        x = MARGIN + min(error, MOST_ERROR) / MOST_ERROR * (WIDTH - 2 * MARGIN)
        return round(x, 1), round(top + HEIGHT - MARGIN - hit_rate / most * (HEIGHT - 2 * MARGIN), 1)

    def line(kind: str, points: Sequence[tuple[float, float]]) -> str:
        return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'

    ours = [place(row["error"], row["hit_rate"]) for row in found["budgets"] if row["hits"]]
    fixed = [place(row["wrong"] / row["hits"], row["hit_rate"]) for row in found["static"] if row["hits"]]
    (left, bottom), (right, _), (_, ceiling) = place(0, 0), place(MOST_ERROR, 0), place(0, most)
    marks = [f'<circle class="dot" cx="{x}" cy="{y}" r="3"/>' for x, y in ours]
    for peer in found["peers"]:
        if peer["hits"] and _error(peer) <= MOST_ERROR:
            x, y = place(_error(peer), peer["hit_rate"])
            marks.append(f'<rect class="peer" x="{x - 3}" y="{y - 3}" width="6" height="6"/>')
            marks.append(f'<text x="{x + 6}" y="{y + 4}">{escape(peer["rule"].split(" (")[0])}</text>')
    return (
        f'<text x="{MARGIN}" y="{top + 20}">{escape(found["file"])}: hits/asked against wrong/hits; line: ibid, '
        "dashes: best fixed cosine</text>"
        f'<path class="axis" fill="none" d="M{left},{ceiling}V{bottom}H{right}"/>'
        f'<text x="{left - 30}" y="{ceiling + 4}">{most:.2f}</text><text x="{left - 10}" y="{bottom + 16}">0</text>'
        f'<text x="{right - 20}" y="{bottom + 16}">{MOST_ERROR:.0%}</text>'
        + line("fixed", fixed)
        + line("ibid", ours)
        + "".join(marks)
    )


def _error(peer: Mapping[str, Any]) -> float:
    return float(peer["wrong"]) / peer["hits"] if peer["hits"] else 1.0
