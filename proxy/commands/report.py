"""`ibid report`: the page to show before serving is switched on, or after a day of it.

Read from the database itself, whether ibid runs or not. What each number rests on stands beside it.
"""

from __future__ import annotations

import asyncio
import html
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

from index.measured import FALSE_ALARMS, MISSES
from proxy.admin.schema import read_time
from proxy.commands import printing
from proxy.commands.codes import FINE
from proxy.core import contrast, hindsight
from proxy.core.contrast import Noise
from proxy.core.directives import WOULD
from proxy.core.hindsight import UNKNOWN, Seen, Share
from proxy.core.reasons import MEANINGS
from proxy.core.units import usd
from proxy.judging.arbiter import OF_A_MODEL
from proxy.judging.audits import BUILT_IN
from proxy.judging.judge import EQUAL, WRONG_BELOW
from proxy.settings.config import Settings
from proxy.store import migrate
from proxy.store.hindsight import Asked, Ended, Hindsight, Limits, Saved
from proxy.store.reading import open_reading, revision

TOP: Final = 10
REASONS: Final = 10
NOT_SERVED: Final = frozenset({"SHADOW", "MISS", "BYPASS", "REFRESH"})


class Kind(NamedTuple):
    """Hits of one tier: requests, what their calls cost or would have, and how many of those are unpriced."""

    tier: str
    requests: int
    nusd: int
    unpriced: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a span of time showed."""

    since_ms: int
    until_ms: int
    max_error: float
    confidence: float
    requests: int
    looked_up: int
    would_be: Sequence[Kind]  # kept back by shadow
    shadow_share: Share
    hits: Sequence[Kind]
    hit_share: Share
    marked_wrong: int  # served hits that somebody who knows said are wrong
    saved: Sequence[Saved]
    most_asked: Sequence[Asked]
    reasons: Sequence[tuple[str, int]]
    advice: str


def run(settings: Settings, since: str, form: str, *, with_text: bool) -> int:
    """Print the report. Raises ConfigError, BadRequest for a time that cannot be read, CacheFault."""
    now_ms = int(time.time() * 1000)
    report = asyncio.run(_read(settings, read_time("since", since, now_ms), now_ms + 1, with_text=with_text))
    sys.stdout.write(FORMS[form](report))
    return FINE


async def _read(settings: Settings, since_ms: int, until_ms: int, *, with_text: bool) -> Report:
    database = open_reading(settings.store.database_url or None, settings.data_dir)
    try:
        migrate.refuse_unless_current(await revision(database))
        found = Hindsight(database, since_ms, until_ms, Limits(EQUAL, WRONG_BELOW))
        return await make(found, settings, since_ms, until_ms, with_text=with_text)
    finally:
        await database.close()


async def make(found: Hindsight, settings: Settings, since_ms: int, until_ms: int, *, with_text: bool) -> Report:
    """The report of what is found. Raises CacheFault."""
    rules, judge_model = settings.rules, settings.cache.judge_model
    built_in = Noise.measured(FALSE_ALARMS, MISSES)
    ended = await found.ended()
    seen = await found.noise(BUILT_IN)
    shadow_share = hindsight.share_wrong(await found.shadowed(), seen.after(built_in), seen, rules.alpha)
    of_hits = (await found.noise(judge_model)).after(OF_A_MODEL) if judge_model else seen.after(built_in)
    pairs, known = await found.audited(judge_model or BUILT_IN)
    hit_share = Share(int(pairs.n), *contrast.share_wrong(pairs, of_hits, rules.alpha)) if pairs.n else UNKNOWN
    would_be = _kinds(ended, lambda one: one.reason.removeprefix(WOULD) if one.reason.startswith(WOULD) else "")
    hits = _kinds(ended, lambda one: _tier_of(one.lane))
    held_back = _held_back(ended)
    is_shadow = any(one.cache_status == "SHADOW" for one in ended)
    counted = would_be if is_shadow else hits
    exact = sum(kind.requests for kind in counted if kind.tier != "semantic")
    looked_up = sum(one.requests for one in ended if one.cache_status not in ("BYPASS", "REFRESH"))
    advice = hindsight.advice(
        Seen(
            looked_up,
            exact,
            sum(kind.requests for kind in counted) - exact,
            shadow_share if is_shadow else hit_share,
            rules.max_error_rate,
            is_shadow,
            held_back[0][0] if held_back else "",
        )
    )
    return Report(
        since_ms=since_ms,
        until_ms=until_ms,
        max_error=rules.max_error_rate,
        confidence=1.0 - rules.alpha,
        requests=sum(one.requests for one in ended),
        looked_up=looked_up,
        would_be=would_be,
        shadow_share=shadow_share,
        hits=hits,
        hit_share=hit_share,
        marked_wrong=int(known.wrong),
        saved=await found.saved(),
        most_asked=await found.most_asked(TOP, with_text=with_text),
        reasons=held_back,
        advice=advice,
    )


def _tier_of(lane: str) -> str:
    """Of a lane that answered without a call; "" of any other."""
    if lane == "stream.coalesce":
        return "collapsed"
    return lane.removeprefix("cache.") if lane.startswith("cache.") else ""


def _kinds(ended: Sequence[Ended], tier_of: Callable[[Ended], str]) -> list[Kind]:
    """Those of a tier, added up, the commonest first."""
    found: dict[str, Kind] = {}
    for one in ended:
        if tier := tier_of(one):
            so_far = found.get(tier, Kind(tier, 0, 0, 0))
            found[tier] = Kind(
                tier,
                so_far.requests + one.requests,
                so_far.nusd + one.baseline_nusd,
                so_far.unpriced + one.unpriced,
            )
    return sorted(found.values(), key=lambda kind: -kind.requests)


def _held_back(ended: Sequence[Ended]) -> list[tuple[str, int]]:
    """Reasons of what was no hit and would have been none, the commonest first."""
    found: dict[str, int] = {}
    for one in ended:
        if one.cache_status in NOT_SERVED and not one.reason.startswith(WOULD) and not _tier_of(one.lane):
            found[one.reason] = found.get(one.reason, 0) + one.requests
    return sorted(found.items(), key=lambda pair: -pair[1])[:REASONS]


# --- forms -----------------------------------------------------------------------------------------------------------


class Table(NamedTuple):
    """A part of the page. `note` stands under its rows."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


def heading(report: Report) -> list[str]:
    """What the page says first."""
    since, until = (_moment(ms) for ms in (report.since_ms, report.until_ms))
    passed = report.requests - report.looked_up
    lines = [
        f"ibid from {since} to {until}",
        f"{report.requests:,} requests: {report.looked_up:,} looked up, {passed:,} not",
    ]
    if report.would_be:
        kept = sum(kind.requests for kind in report.would_be)
        nusd = sum(kind.nusd for kind in report.would_be)
        part, unknown = _part(kept, report.looked_up), _unknown(report.would_be)
        lines.append(f"shadow: {kept:,} would have been served ({part}), saving {usd(nusd)} USD{unknown}")
    if report.hits:
        served = sum(kind.requests for kind in report.hits)
        nusd = sum(one.saved_nusd for one in report.saved)
        lines.append(f"served: {served:,} ({_part(served, report.looked_up)}); saved in all {usd(nusd)} USD")
    return [*lines, *_wrong(report), f"Advice: {report.advice}"]


def _unknown(kinds: Sequence[Kind]) -> str:
    """What the money leaves out."""
    count = sum(kind.unpriced for kind in kinds)
    return f", and {count:,} without a known price" if count else ""


def _wrong(report: Report) -> list[str]:
    """How often look-alikes were wrong, as far as it is known."""
    lines = []
    by = f"at {100 * report.confidence:g} % confidence"
    if report.shadow_share.compared:
        said = hindsight.shown(report.shadow_share)
        lines.append(
            f"wrong among look-alikes in shadow: {said} {by}, from {report.shadow_share.compared:,} comparisons"
        )
    if report.hit_share.compared:
        said = hindsight.shown(report.hit_share)
        lines.append(f"wrong among look-alikes served: {said} {by}, from {report.hit_share.compared:,} audits")
    if report.marked_wrong:
        lines.append(f"marked wrong by people: {report.marked_wrong:,} served look-alikes")
    return lines


def tables(report: Report) -> list[Table]:
    """The parts of the page that have rows."""
    columns = ("tier", "requests", "share of lookups", "USD", "unpriced")

    def kinds(found: Sequence[Kind]) -> list[tuple[Any, ...]]:
        return [
            (kind.tier, kind.requests, _part(kind.requests, report.looked_up), usd(kind.nusd), kind.unpriced)
            for kind in found
        ]

    has_text = any(one.question is not None for one in report.most_asked)
    asked = ("entry", "times", "model", "USD", *(("question",) if has_text else ()))
    found = [
        Table(
            "What shadow kept from being served", columns, kinds(report.would_be),
            "USD: what the calls cost that would not have been made. Unpriced ones are counted as 0.",
        ),
        Table("What was served", columns, kinds(report.hits), "USD: what the calls would have cost."),
        Table(
            "What was saved, by strategy", ("strategy", "mechanism", "steps", "saved USD", "unpriced"),
            [(one.family, one.mechanism, one.steps, usd(one.saved_nusd), one.unpriced) for one in report.saved],
            "Negative: what ibid's own calls, such as audits, cost.",
        ),
        Table(
            "Questions asked again most often", asked,
            [
                (one.entry_id, one.times, one.model, usd(one.baseline_nusd), one.question or "-")[: len(asked)]
                for one in report.most_asked
            ],
            "" if has_text else "--text shows the questions themselves.",
        ),
        Table(
            "What kept the others from hitting", ("reason", "requests", "means"),
            [(reason, count, MEANINGS.get(reason, "")) for reason, count in report.reasons],
            "`ibid docs verdicts` explains every reason.",
        ),
    ]  # fmt: skip
    return [table for table in found if table.rows]


def as_text(report: Report) -> str:
    parts = ["\n".join(heading(report)) + "\n"]
    for table in tables(report):
        note = f"{table.note}\n" if table.note else ""
        parts.append(f"{table.title}\n{printing.as_table(table.columns, table.rows)}{note}")
    return "\n".join(parts)


def as_html(report: Report) -> str:
    """One page that needs nothing else."""
    said = "".join(f"<p>{html.escape(line)}</p>" for line in heading(report)[1:])
    body = "".join(_html_table(table) for table in tables(report))
    title = html.escape(heading(report)[0])
    style = (
        "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse;width:100%}td,th{padding:.2rem .6rem;border-bottom:1px solid #ccc;"
        "text-align:left}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{style}</style></head><body><h1>{title}</h1>{said}{body}</body></html>\n"
    )


def _html_table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.columns)
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(printing.printable(str(cell)))}</td>" for cell in row) + "</tr>"
        for row in table.rows
    )
    note = f"<p>{html.escape(table.note)}</p>" if table.note else ""
    return f"<h2>{html.escape(table.title)}</h2><table><tr>{head}</tr>{rows}</table>{note}"


def as_json(report: Report) -> str:
    """For machines: money as exact decimal strings, shares 0 to 1."""

    def kinds(found: Sequence[Kind]) -> dict[str, Any]:
        return {
            kind.tier: {"requests": kind.requests, "usd": usd(kind.nusd), "unpriced": kind.unpriced} for kind in found
        }

    def share(found: Share) -> dict[str, Any]:
        estimate = found.estimate if found.compared else None
        return {"compared": found.compared, "share": estimate, "interval": [found.low, found.high]}

    return printing.as_json(
        {
            "since_ms": report.since_ms,
            "until_ms": report.until_ms,
            "requests": report.requests,
            "looked_up": report.looked_up,
            "max_error_rate": report.max_error,
            "confidence": report.confidence,
            "shadow": {"would_be_hits": kinds(report.would_be), "wrong": share(report.shadow_share)},
            "served": {
                "hits": kinds(report.hits),
                "wrong": share(report.hit_share),
                "marked_wrong": report.marked_wrong,
                "saved": [
                    {
                        "strategy": one.family,
                        "mechanism": one.mechanism,
                        "steps": one.steps,
                        "usd": usd(one.saved_nusd),
                        "unpriced": one.unpriced,
                    }
                    for one in report.saved
                ],
            },
            "most_asked": [
                {
                    "entry": one.entry_id,
                    "times": one.times,
                    "model": one.model,
                    "usd": usd(one.baseline_nusd),
                    **({} if one.question is None else {"question": one.question}),
                }
                for one in report.most_asked
            ],
            "reasons": [
                {"reason": reason, "requests": count, "means": MEANINGS.get(reason, "")}
                for reason, count in report.reasons
            ],
            "advice": report.advice,
        }
    )


FORMS: Final[Mapping[str, Callable[[Report], str]]] = {"text": as_text, "json": as_json, "html": as_html}


def _moment(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _part(some: int, whole: int) -> str:
    return f"{100 * some / whole:.1f} %" if whole else "-"
