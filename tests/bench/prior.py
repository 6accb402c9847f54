"""How often an answer is wrong where the pair guard is sure: `python -m tests.bench.prior`, for `index.guard.prior`.

Streams of `tests.bench.reallife`, as authored, three seeds: a question that is new is decided once, for the surest of
its NEAREST earlier ones that no guard of knowledge forbids; what is served is not kept. Printed for each row are pairs,
counted once over all streams, and requests: a wording that is asked often counts as often.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Final

import numpy as np

from index.guard.prior import ROWS
from index.kernels import veto_bits
from proxy.commands.evaluate import interval, open_texts
from proxy.commands.rehearsal import Texts
from proxy.core.policy import KNOWN
from tests.bench.reallife import QUESTIONS, SEEDS, STREAMS, Asked, questions, stream
from tests.models import converted_data_dir

NEAREST: Final = 3  # candidates that the guard is asked about


def served(asked: Sequence[Asked], texts: Texts, alike: float, sure: float) -> dict[str, str]:
    """Text asked → the kept text whose answer it is given."""
    first = list(dict.fromkeys(one.text for one in asked))
    texts.prepare(first)
    table = np.stack([vector for text in first if (vector := texts.vector(text)) is not None])
    found: dict[str, str] = {}
    for i, text in enumerate(first):
        kept = [j for j in range(i) if first[j] not in found]
        near = sorted(kept, key=lambda j: -float(table[j] @ table[i]))[: 2 * NEAREST]
        fit = [
            first[j]
            for j in near
            if table[j] @ table[i] >= alike and not veto_bits(texts.signature(text), texts.signature(first[j])) & KNOWN
        ]
        logits = {other: texts.logit(text, other) for other in fit[:NEAREST]}
        best = max(logits, key=lambda other: logits[other], default="")
        if best and logits[best] > sure:
            found[text] = best
    return found


def main() -> None:
    texts = asyncio.run(open_texts(converted_data_dir(), "all-MiniLM-L6-v2", "onnx", 1))
    rows = questions(QUESTIONS)
    streams = [stream(rows, "authored", STREAMS["authored"], seed) for seed in SEEDS]
    for budget, alike, sure in ROWS:
        pairs: dict[tuple[str, str], bool] = {}
        requests: Counter[bool] = Counter()
        for asked in streams:
            meaning = {one.text: one.meaning for one in asked}
            times = Counter(one.text for one in asked)
            for text, kept in served(asked, texts, alike, sure).items():
                wrong = meaning[text] != meaning[kept]
                pairs[text, kept] = wrong
                requests[wrong] += times[text]
        wrong, n = sum(pairs.values()), len(pairs)
        low, high = (100 * bound for bound in interval(wrong, n))
        print(f"budget {budget}: similarity from {alike}, logit above {sure}: {wrong} wrong of {n} pairs", end=" ")
        print(f"({low:.1f} to {high:.1f} %); of requests {requests[True]} of {requests.total()}")


if __name__ == "__main__":
    main()
