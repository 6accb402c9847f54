"""Where the pair guard's word is enough before anything is known of a scope: how alike two texts are, how sure it is.

Measured by `python -m tests.bench.prior` on three streams of `tests/bench/answers_dev.jsonl` (81 questions, four
wordings and a look-alike each, none of them ever trained on), 30 November 2026, among pairs that no guard of knowledge
forbids; a pair is counted once, with the 95 % interval of Clopper and Pearson:

    similarity from .80, logit above 3.5:   0 wrong of 52 pairs (0 to 6.8 %);    0 of 503 requests they answer
    similarity from .80, logit above 3.0:   0 wrong of 65 pairs (0 to 5.5 %);    0 of 555
    similarity from .75, logit above 3.0:   3 wrong of 94 pairs (.7 to 9.0 %);  27 of 772

The rows keep within their budgets there; how far that carries to other questions the intervals say: it is where audits
begin, not where they end. Questions with four look-alikes each, written to be mistaken for one another, are harder:
there 2 of 13 were wrong from .80 and 3.0 on, 0 of 6 from 4.0.
"""

from __future__ import annotations

from typing import Final

ROWS: Final = ((0.01, 0.80, 3.5), (0.02, 0.80, 3.0), (0.05, 0.75, 3.0))
"""(budget from which it holds, similarity from, logit above)."""


def within(similarity: float, logit: float, budget: float) -> bool:
    """Whether pairs of this similarity and logit, and surer ones, were measured to be wrong within the budget."""
    return any(budget >= least and similarity >= alike and logit > sure for least, alike, sure in ROWS)
