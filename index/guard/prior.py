"""How likely a stored answer is wrong for a question, before anything is known of a scope: by likeness and logit alone.

Measured with `python -m index.guard.training.prior`, which says how and prints what stands here (`make train-guard`
runs it). The decisions are those of made-up streams over families of questions that the head behind the numbers had
not seen: real rewordings, and two look-alikes for each question that were written to be mistaken for it. Traffic with
fewer look-alikes has fewer wrong hits than this says.
"""

from __future__ import annotations

import math

COEFFICIENTS = (0.9373, -0.6023, -1.5071)
"""Of the log-odds that it is wrong: constant, factor of the logit, factor of the similarity."""

LIMITS = (
    (0.005, 0.0000),  # 0 / 0
    (0.01, 0.0000),  # 0 / 0
    (0.02, 0.0000),  # 0 / 0
    (0.03, 0.0257),  # 1 / 35
    (0.05, 0.0715),  # 13 / 262
    (0.1, 0.1681),  # 86 / 860
)
"""Budget, the highest prior up to which the share of wrong decisions was within it; behind it wrong / decisions."""


def prior(similarity: float, logit: float) -> float:
    """Probability that the answer is wrong, 0 to 1, falling in both. 1 without an opinion of the guard.

    `similarity` is the cosine of the texts' embeddings. Of several candidates the one with the highest logit is meant,
    among the sixteen nearest that no veto of knowledge forbids.
    """
    if not math.isfinite(logit):
        return 1.0
    constant, by_logit, by_similarity = COEFFICIENTS
    return 1 / (1 + math.exp(-constant - by_logit * logit - by_similarity * similarity))


def within(similarity: float, logit: float, budget: float) -> bool:
    """Whether pairs like this, and all that are surer, were wrong within the budget."""
    return prior(similarity, logit) <= limit(budget)


def limit(budget: float) -> float:
    """The prior up to which may be served so that at most `budget` of what is served is wrong; 0, nothing, if none."""
    return max((found for least, found in LIMITS if least <= budget), default=0.0)
