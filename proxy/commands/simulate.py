"""`ibid simulate`: the stored questions once more, under another budget, model or set of guards.

They are rehearsed from an empty cache in the order in which they were stored. Whether serving one's answer for another
would have been right is known where their answers were compared; where not, a hit is counted as unjudged and teaches
nothing. Money is the list price of the answers that would not have been fetched, less the audits.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from proxy.commands import printing
from proxy.commands.codes import FINE
from proxy.commands.evaluate import interval, open_texts
from proxy.commands.labelled import Asked
from proxy.commands.rehearsal import Rehearsal
from proxy.core import policy
from proxy.core.errors import BadRequest, ConfigError
from proxy.judging.judge import PAIR_GUARD
from proxy.settings.config import Settings
from proxy.store.reading import open_reading
from proxy.store.traffic import Traffic, read_traffic


async def simulate(
    settings: Settings,
    *,
    max_errors: Sequence[float],
    model: str | None = None,
    without: Sequence[str] = (),
    namespace: str | None = None,
    limit: int = 20_000,
) -> dict[str, Any]:
    """One row a budget. Raises ConfigError, BadRequest for a guard there is not, CacheFault."""
    known = (*policy.GUARDS, PAIR_GUARD)
    unknown = [guard for guard in without if guard not in known]
    if unknown:
        raise BadRequest(f"no guard {unknown[0]!r}: one of {', '.join(known)}", code="invalid_value")
    ignored = policy.mask(*(guard for guard in without if guard != PAIR_GUARD))
    database = open_reading(settings.store.database_url or None, settings.data_dir)
    try:
        traffic = await read_traffic(database, namespace=namespace, limit=limit)
    finally:
        await database.close()
    wanted = settings.embedding
    texts = await open_texts(settings.data_dir, model or wanted.model, wanted.backend, wanted.threads)
    texts.prepare((question.prompt for question in traffic.questions), "embedding")
    rows = []
    for max_error in max_errors:
        guarded = settings.rules.pair_guard and PAIR_GUARD not in without
        rules = replace(settings.rules, max_error_rate=max_error, pair_guard=guarded)
        run = Rehearsal(texts, rules, max_error, truth=_Truth(traffic), ignored=ignored)
        saved_nusd = audits_nusd = 0
        for question in traffic.questions:
            outcome = run.ask(Asked(question.prompt, str(question.entry_id), True, question.scope))
            saved_nusd += question.price_nusd * outcome.hit
            audits_nusd += question.price_nusd * outcome.audited
        rows.append(_row(max_error, run, saved_nusd, audits_nusd))
    return {
        "questions": len(traffic.questions),
        "requests": traffic.requests,
        "exact_hits": traffic.exact_hits,
        "semantic_hits": traffic.semantic_hits,
        "model": model or wanted.model,
        "without": list(without),
        "budgets": rows,
    }


class _Truth:
    """Whether two stored questions have one answer: True, False, or None where nobody compared them."""

    def __init__(self, traffic: Traffic) -> None:
        self._groups = {str(q.entry_id): q.group_id for q in traffic.questions}
        self._differing = traffic.differing

    def __call__(self, kept: Asked, asked: Asked) -> bool | None:
        group = self._groups[kept.answer]
        if group == self._groups[asked.answer]:
            return True
        return False if (int(asked.answer), group) in self._differing else None


def _row(max_error: float, run: Rehearsal, saved_nusd: int, audits_nusd: int) -> dict[str, Any]:
    counts = run.counts
    judged = counts.hits - counts.unjudged
    low, high = interval(counts.wrong, judged)
    return {
        "max_error": max_error,
        "hits": counts.hits,
        "hit_rate": counts.hits / counts.asked if counts.asked else 0.0,
        "judged": judged,
        "wrong": counts.wrong,
        "error": counts.wrong / judged if judged else None,
        "interval": [low, high] if judged else None,
        "audits": counts.audited,
        "saved_usd": saved_nusd / 1e9,
        "audits_usd": audits_nusd / 1e9,
        "reasons": dict(sorted(counts.reasons.items(), key=lambda item: -item[1])),
    }


def table(found: dict[str, Any]) -> tuple[tuple[str, ...], list[list[Any]]]:
    """Columns and rows for people."""
    columns = ("budget", "hits/questions", "wrong/judged", "error", "95 %", "audits", "saved_usd", "audits_usd")
    rows = [
        [
            f"{row['max_error']:.1%}",
            f"{row['hits']}/{found['questions']} ({row['hit_rate']:.1%})",
            f"{row['wrong']}/{row['judged']}",
            "-" if row["error"] is None else f"{row['error']:.2%}",
            "-" if row["interval"] is None else f"{row['interval'][0]:.2%}-{row['interval'][1]:.2%}",
            row["audits"],
            row["saved_usd"],
            row["audits_usd"],
        ]
        for row in found["budgets"]
    ]
    return columns, rows


def run(settings: Settings, chosen: argparse.Namespace) -> int:
    budgets = chosen.max_error or [settings.rules.max_error_rate]
    if not all(0.0 < budget < 1.0 for budget in budgets):
        raise ConfigError("--max-error takes shares between 0 and 1")
    found = asyncio.run(
        simulate(
            settings,
            max_errors=budgets,
            model=chosen.model,
            without=chosen.without,
            namespace=chosen.namespace,
            limit=chosen.limit,
        )
    )
    if chosen.json:
        sys.stdout.write(printing.as_json(found))
        return FINE
    print(
        f"{found['questions']:,} stored questions with {found['model']}; of {found['requests']:,} requests so far "
        f"{found['exact_hits']:,} were exact and {found['semantic_hits']:,} semantic hits"
    )
    sys.stdout.write(printing.as_table(*table(found)))
    return FINE
