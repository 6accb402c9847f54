"""Where the pair guard's word is enough before anything is known of a scope: how alike two texts are, how sure it is.

Measured by `python -m tests.bench.prior` (which says how) on five streams of `tests/bench/answers_dev.jsonl`, 81
questions of four wordings and a look-alike each, none of them ever trained on; and on five streams of 281 families of
questions that the second head was not taught, with look-alikes made to be mistaken for them. 1 December 2026, the most
similar earlier question that no guard of knowledge forbids; a pair counts once, with the 95 % interval of Clopper and
Pearson, a request as often as it was asked:

    from .70, above 3.0:    questions  0 wrong of  87 pairs (0 to 4.2 %),   0 of 1,075 requests
                            families   5 wrong of 123 pairs (1.3 to 9.2 %), 13 of 1,120
    from .65, above 3.0:    questions  1 wrong of  90 pairs (0 to 6.0 %),   6 of 1,096
                            families   5 wrong of 143 pairs (1.1 to 8.0 %), 13 of 1,320
    from .70, above 2.25:   questions  1 wrong of 120 pairs (0 to 4.6 %),   7 of 1,293
                            families  12 wrong of 246 pairs (2.5 to 8.4 %), 176 of 2,262

Half of the families' wrong pairs ask the same by any reader. The questions keep within their budgets, the families
nearly, but for one popular look-alike in the last row: how far either carries the intervals say. It is where audits
begin, not where they end. The second was a row for a budget of 2 % and is none: a live stream served 77 by it, 3 wrong.
"""

from __future__ import annotations

from typing import Final

ROWS: Final = ((0.01, 0.70, 3.0), (0.05, 0.70, 2.25))
"""(budget from which it holds, similarity from, logit above)."""


def within(similarity: float, logit: float, budget: float) -> bool:
    """Whether pairs of this similarity and logit, and surer ones, were measured to be wrong within the budget."""
    return any(budget >= least and similarity >= alike and logit > sure for least, alike, sure in ROWS)
