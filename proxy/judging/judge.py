"""The judge: candidates in, one to serve or none out, with every reason. Learns from labels; no I/O, no clock.

Four levels hold evidence: the scope, the tenant's namespace, the tenant, the installation. Every label feeds all four;
the bound is taken of the finest that has `THICK` labelled decisions. What was wrong closes the scope it happened in and
no other: there it makes a new scope more cautious, as a prior does.

What the judge knows derives from rows of the audit table (`Comparison`): a restart or another replica learns by
applying them again, in their order.

Memory is bounded, and what narrows outlives it. A judge with `note` tells every change of a level's tally, so that a
level that was dropped can be read back (`unread`, `restore`); until that is done nothing is served on its account.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from proxy import ports
from proxy.core import risk
from proxy.core.contrast import Noise, Pairs, share_wrong
from proxy.core.model import Candidate, Comparison, Miss, NearMiss, Rules
from proxy.core.policy import ALWAYS, GUARDS, HARD, KNOWN
from proxy.core.risk import ALIKE, NORMAL, Account, LevelName, Region, Standing, Tally, Thresholds

THICK: Final = 100
REVIEW_EVERY: Final = 40  # labels
LEARN_FROM: Final = 0.60  # similarity; what is less alike teaches nothing
SAME_FROM: Final = 0.80  # probability from which an entry joins the group of the one it was compared with
WRONG_BELOW: Final = 0.50  # probability of being the same under which a comparison alarms
EQUAL: Final = 0.999  # from which answers are equal but for case, space and punctuation: no comparison can err
FEEDBACK: Final = ""  # the comparer of a label by somebody who knows
LIMITS: Final[Mapping[str, int]] = MappingProxyType({"scope": 256, "namespace": 64, "tenant": 64, "installation": 1})
"""Levels in memory, of each kind; the least recently used leave."""
GROUPS: Final = 200_000
KEPT_SHARE: Final = 8  # of the bound of levels, that stays when memory is short: one in so many
REFUSED: Final = 65_536  # refused pairs in memory; the others are looked for in SQL
GUARD_ASKS: Final = 3  # candidates of a lookup that the pair guard is asked about: each costs time
PAIR_GUARD: Final = "pair_guard"
SURE: Final = 30.0  # a logit than which the pair guard gives none higher


class Place(NamedTuple):
    """Where a lookup happens. `namespace` is the tenant's."""

    scope: bytes
    namespace: str
    tenant: str
    fingerprint: bytes

    @property
    def levels(self) -> tuple[LevelName, ...]:
        return (
            LevelName("scope", scope=self.scope),
            LevelName("namespace", tenant=self.tenant, namespace=self.namespace),
            LevelName("tenant", tenant=self.tenant),
            INSTALLATION,
        )


INSTALLATION: Final = LevelName("installation")
NO_NOISE: Final = Noise()
Note = Callable[[LevelName, Tally], None]
"""Takes by how much a level's tally changed. Never raises."""


@dataclass(slots=True)
class Judged:
    """One group's best candidate and what the judge makes of it."""

    candidate: Candidate
    group_id: int
    log_odds: float
    probability: float  # that its answer is the right one: of the start region its record, else of the log-odds
    standing: Standing | None  # how it would be served; None when it would not
    reason: str  # the standing, a guard's name, "below_bound", "budget_spent", "refused_before"
    region: str  # whose hits need no proof, and where its evidence counts; "" for none
    by_guard: bool  # in its region only if the pair guard's word is good enough
    row: NDArray[np.float64]
    words: NDArray[np.int64]


@dataclass(slots=True)
class Opinion:
    """What the judge thinks of a lookup: groups in the order they would be tried, and the evidence behind it."""

    place: Place
    signature: ports.Signature
    max_error: float
    level: str  # whose evidence was used; "" when none was thick enough
    thresholds: Thresholds
    has_room: bool
    judged: list[Judged]
    refused: dict[int, str] = field(default_factory=dict)  # entries the gate or the pair guard turned down, and why
    logits: dict[int, float] = field(default_factory=dict)  # entries the pair guard was asked about, and what it said
    stands_for: float | None = None  # would-be hits like this one that its label speaks for; None: no audit is due

    @property
    def chosen(self) -> Judged | None:
        """The first that may be served."""
        for judged in self._left():
            if judged.standing is Standing.PROVEN or (judged.standing and self.has_room):
                return judged
        return None

    @property
    def decision(self) -> Judged | None:
        """The one this lookup is about: what is, or would have been, served; else the most probable."""
        if (chosen := self.chosen) is not None:
            return chosen
        left = list(self._left())
        would_be = next((judged for judged in left if judged.standing is not None), None)
        allowed = next((judged for judged in left if not judged.candidate.vetoes & ALWAYS), None)
        return would_be or allowed or next(iter(left), None) or next(iter(self.judged), None)

    @property
    def guarded(self) -> Judged | None:
        """The first that would have been served, had the pair guard not refused it."""
        return next((j for j in self.judged if self.refused.get(j.candidate.entry_id) == PAIR_GUARD), None)

    @property
    def may_ask(self) -> bool:
        """Whether the pair guard may be asked about one more; what it was not asked about is refused."""
        return len(self.logits) < GUARD_ASKS

    def _left(self) -> Iterable[Judged]:
        return (judged for judged in self.judged if judged.candidate.entry_id not in self.refused)


class Level:
    """Evidence of one level. `is_whole`: what is written down of it is part of its account."""

    __slots__ = ("account", "is_whole", "labelled", "learner", "noise", "stale", "thresholds")

    def __init__(self, learner: ports.Learner, *, is_whole: bool) -> None:
        self.learner = learner
        self.is_whole = is_whole
        self.labelled = 0  # decisions that are evidence, ever
        self.account = Account()
        self.noise = Noise()  # of the comparer in use
        self.thresholds: dict[float, Thresholds] = {}
        self.stale = 0  # labels since the thresholds were derived

    @property
    def tally(self) -> Tally:
        return self.account.tally(self.labelled)

    def bounds(self, max_error: float, alpha: float, levels: Sequence[float], prior: Noise) -> Thresholds:
        found = self.thresholds.get(max_error)
        if found is None:
            if len(self.thresholds) > 16:  # clients may ask for any
                self.thresholds.clear()
            found = self.thresholds[max_error] = self._derive(max_error, alpha, levels, prior)
        return found

    def review(self, alpha: float, levels: Sequence[float], prior: Noise, *, wrong: bool) -> None:
        """Derive thresholds anew after a label: at once when it was a wrong mark, and then never a looser one."""
        self.stale += 1
        if self.stale >= REVIEW_EVERY and not wrong:
            self.stale = 0
            self.thresholds = {e: self._derive(e, alpha, levels, prior) for e in self.thresholds}
        elif wrong:
            self.thresholds = {
                e: self._derive(e, alpha, levels, prior).narrowed(before) for e, before in self.thresholds.items()
            }

    def _derive(self, max_error: float, alpha: float, levels: Sequence[float], prior: Noise) -> Thresholds:
        doubt = risk.doubt_of(self.noise.after(prior), self.noise, alpha)
        return risk.thresholds_of(levels, self.learner.levels(), max_error, alpha, doubt)


class Judge:
    """Lives on the event loop. `new_learner` makes an empty ports.Learner; `levels` are its levels of log-odds.

    `comparer` names what compares answers, and `noise` is what was measured of it elsewhere; a label by another is no
    evidence of its rates. `prior` tells where pairs of a similarity and a logit of the pair guard were measured to be
    wrong within a budget; without one no pair is served on the guard's word.
    """

    def __init__(
        self,
        rules: Rules,
        new_learner: ports.NewLearner,
        levels: Sequence[float],
        *,
        comparer: str = FEEDBACK,
        noise: Noise = NO_NOISE,
        prior: ports.Prior | None = None,
        note: Note | None = None,
        limits: Mapping[str, int] = LIMITS,
    ) -> None:
        self.rules = rules
        self.comparer = comparer
        self._noise = noise
        self.prior = prior
        self._note = note
        self.epoch = 0  # rises when something was narrowed: what was remembered of earlier verdicts is void
        self.new_learner = new_learner
        self._steps = levels
        self._levels: dict[str, OrderedDict[LevelName, Level]] = {kind: OrderedDict() for kind in limits}
        self._limits = limits
        self._groups: OrderedDict[int, int] = OrderedDict()  # of entries whose group is not their own id
        self._refused: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self.knows_all_refused = True  # no refused pair was dropped from memory

    def labels_of(self, place: Place) -> float:
        """Labelled decisions of a scope."""
        level = self._levels["scope"].get(place.levels[0])
        return 0.0 if level is None else level.labelled

    @property
    def least_odds(self) -> float:
        """Log-odds below which no decision counts."""
        return self._steps[0]

    @property
    def feature_names(self) -> Sequence[str]:
        return self._level(INSTALLATION).learner.names

    # -- judging ----------------------------------------------------------------------------------------------------

    def consider(
        self, place: Place, signature: ports.Signature, candidates: Sequence[Candidate], max_error: float
    ) -> Opinion:
        """Judge candidates (descending similarity, each with its signature). `max_error` may only be tighter than the
        rules' own."""
        scope = self._level(place.levels[0])
        name, level = self._evidence(place)
        is_known = not self.unread(place)
        rules, noise = self.rules, self.noise_of(place)
        is_closed = scope.account.alike.is_closed(max_error, noise, rules.alpha)
        bounds = Thresholds()
        if name and is_known and not is_closed:
            bounds = level.bounds(max_error, rules.alpha, self._steps, self._noise)
        has_room = is_known and scope.account.has_room(max_error, self._caution(place, max_error))
        if not candidates:
            return Opinion(place, signature, max_error, name, bounds, has_room, [])
        rates = self._open_regions(place, max_error) if is_known else {}
        groups = np.array([self.group_of(c.entry_id) for c in candidates], np.int64)
        similarities = np.array([c.similarity for c in candidates], np.float32)
        found = level.learner.consider(signature, np.stack([c.signature for c in candidates]), similarities, groups)
        nearest = next((self.group_of(c.entry_id) for c in candidates if not c.vetoes & KNOWN), None)
        judged = [
            self._judge(candidates[one.place], one, bounds, has_room, rates, max_error, nearest=one.group_id == nearest)
            for one in found
        ]
        return Opinion(place, signature, max_error, name, bounds, has_room, judged)

    def _judge(
        self,
        candidate: Candidate,
        one: ports.Considered,
        bounds: Thresholds,
        has_room: bool,
        rates: Mapping[str, float],
        max_error: float,
        *,
        nearest: bool,
    ) -> Judged:
        vetoes = candidate.vetoes
        region, by_guard = self._region(candidate, max_error, nearest=nearest)
        standing = risk.standing_of(
            one.log_odds,
            region=region,
            vetoed=bool(vetoes & ALWAYS) or not math.isfinite(candidate.similarity),
            thresholds=bounds,
            open_regions=frozenset(rates),
        )
        if standing is not None:
            reason = standing.value if has_room or standing is Standing.PROVEN else "budget_spent"
        elif region and not by_guard:
            reason = "budget_spent"
        elif (objecting := vetoes & ALWAYS or vetoes & HARD) != 0:
            reason = GUARDS[(objecting & -objecting).bit_length() - 1]
        else:
            reason = "below_bound"
        needs_no_proof = standing in {Standing.START, Standing.NORMAL}
        probability = 1.0 - rates[region] if needs_no_proof else probability_of(one.log_odds)
        by_guard = by_guard and standing is Standing.START
        return Judged(
            candidate, one.group_id, one.log_odds, probability, standing, reason, region, by_guard, one.row, one.words
        )

    def _region(self, candidate: Candidate, max_error: float, *, nearest: bool) -> tuple[str, bool]:
        """Whose hits need no proof, and whether the pair guard has to speak for it; it is not asked where no word of
        its would be enough, nor unless the candidate is of the `nearest` group, that of the most similar one which is
        not known to differ: farther ones are wrong more often (any of three: 1 of 91 pairs, the nearest: 0 of 87)."""
        vetoes = candidate.vetoes
        if candidate.normal:
            return (NORMAL, False) if not vetoes & ALWAYS else ("", False)
        if candidate.similarity >= self.rules.start_similarity and not vetoes & HARD:
            return ALIKE, False
        if not nearest or self.prior is None or vetoes & KNOWN:
            return "", False
        return (ALIKE, True) if self.prior(candidate.similarity, SURE, max_error) else ("", False)

    def _open_regions(self, place: Place, max_error: float) -> dict[str, float]:
        """Regions that serve without proof here, with the share of wrong ones that is expected of each."""
        noise = self.noise_of(place)
        found = {}
        for name in (NORMAL, ALIKE):
            region = self._level(place.levels[0]).account.region(name)
            rate = region.rate(risk.prior_of(name, self._others(place, name), max_error))
            if rate <= max_error * (1 + 1e-9) and not region.is_closed(max_error, noise, self.rules.alpha):
                found[name] = rate  # the default budget is met exactly
        return found

    def _others(self, place: Place, region: str) -> Region:
        """What other scopes of this installation showed for certain."""
        all_of_it = self._level(INSTALLATION).account.region(region)
        own = self._level(place.levels[0]).account.region(region)
        return Region(max(0.0, all_of_it.n - own.n), max(0.0, all_of_it.wrong - own.wrong))

    def _caution(self, place: Place, max_error: float) -> float:
        """By how much a scope's credit shrinks where other scopes were worse than the budget, 1 or more."""
        whole, own = self._level(INSTALLATION).account, self._level(place.levels[0]).account
        n, wrong = whole.would_be - own.would_be, whole.would_be_wrong - own.would_be_wrong
        rate = (max(0.0, wrong) + risk.SHRINK_LABELS * max_error) / (max(0.0, n) + risk.SHRINK_LABELS)
        return max(1.0, rate / max_error) if max_error > 0.0 else 1.0

    def noise_of(self, place: Place) -> Noise:
        """What is known of the comparer's errors here: each level's own, drawn towards that of the level above."""
        noise = self._noise
        for name in reversed(place.levels):
            level = self._levels[name.kind].get(name)
            if level is not None:
                noise = level.noise.after(noise)
        return noise

    def audit_share(self, opinion: Opinion, judged: Judged, uses: int = 1) -> float:
        """The share of such hits, on a wording that was served `uses` times since, that must be asked again."""
        assert judged.standing is not None
        place = opinion.place
        account, noise = self._level(place.levels[0]).account, self.noise_of(place)
        region = judged.region or ALIKE
        alarm = account.region(region).alarm(opinion.max_error, noise)
        least = self.rules.audit_share
        return risk.audit_share(judged.standing, account, region, alarm, self.rules.alpha, least, uses)

    # -- learning ---------------------------------------------------------------------------------------------------

    def see(self, place: Place, signature: ports.Signature) -> None:
        """A question was asked here: its words are that much less rare."""
        for level in self._all(place):
            level.learner.see(signature)

    def serve(self, place: Place, count: float = 1.0, *, own: bool = True) -> None:
        """A semantic hit was served; not `own`: by another process, or before the start."""
        for name in place.levels:
            with self._changing(name, own) as level:
                level.account.hits += count

    def apply(self, found: Comparison, *, own: bool = True) -> None:
        """A comparison came out: learn from it, at every level."""
        is_wrong, certain = found.p_same < WRONG_BELOW, is_certain(found)
        is_evidence = self.weight_of(found) > 0.0
        for name in place_of(found).levels:
            with self._changing(name, own) as level:
                learn(level.learner, found, self.weight_of(found))
                if is_evidence:
                    level.labelled += 1
                    if level.labelled == THICK > level.learner.labelled and self._note is not None:
                        level.is_whole = False  # it was dropped in between: its learner has to see the others as well
                    if certain:
                        level.account.label(float(is_wrong), found.weight, **_about(found))
                    if found.p_null is not None and found.standing:
                        level.account.pair(pair_of(found.p_same, found.p_null), found.region or ALIKE)
                    level.review(self.rules.alpha, self._steps, self._noise, wrong=is_wrong and certain)
            if found.p_null is not None and found.comparer == self.comparer:
                self._saw_repeat(name, found.p_null)
        self.epoch += is_evidence and is_wrong and certain

    def weight_of(self, found: Comparison) -> float:
        """For how many decisions a label counts: those of another comparer than the one in use train the weights and
        are no evidence, because its errors are not known."""
        return found.weight if found.comparer in {FEEDBACK, self.comparer} else 0.0

    def teach(self, learner: ports.Learner, found: Comparison) -> None:
        """Have a learner learn from a comparison whose question it has not seen."""
        learner.see(signature_from(found.signature))
        learn(learner, found, self.weight_of(found))

    def saw_repeat(self, place: Place, p_same: float) -> None:
        """One question was answered twice, and the answers compared by the comparer in use."""
        for name in place.levels:
            self._saw_repeat(name, p_same)

    def _saw_repeat(self, name: LevelName, p_same: float) -> None:
        if p_same < EQUAL:  # equal answers are certain, and no comparison
            level = self._level(name)
            level.noise = level.noise.plus(Noise(repeats=1.0, false_alarms=float(p_same < WRONG_BELOW)))

    def saw_differing(self, place: Place, p_same: float) -> None:
        """Answers to two questions that are known to differ were compared by the comparer in use."""
        for name in place.levels:
            level = self._level(name)
            level.noise = level.noise.plus(Noise(differing=1.0, alarms=float(p_same < WRONG_BELOW)))

    def correct(self, found: Comparison, p_same: float) -> None:
        """Someone who knows says otherwise than this comparison, which was applied before."""
        if found.weight <= 0.0:
            return
        wrong = p_same < WRONG_BELOW
        for name in place_of(found).levels:
            with self._changing(name) as level:
                if is_certain(found):
                    before = float(found.p_same < WRONG_BELOW)
                    level.account.correct(before, float(wrong), found.weight, **_about(found))
                else:
                    level.account.label(float(wrong), found.weight, **_about(found))
                level.review(self.rules.alpha, self._steps, self._noise, wrong=wrong)
        self.epoch += wrong

    def enter(self, place: Place, entry_id: int, group_id: int) -> None:
        """An entry was stored; its answer is the same as that of `group_id` (its own id when of none)."""
        self.join(entry_id, group_id)
        for level in self._all(place):
            level.learner.store(group_id)

    def join(self, entry_id: int, group_id: int) -> None:
        if entry_id != group_id:
            self._groups[entry_id] = group_id
            if len(self._groups) > GROUPS:
                self._groups.popitem(last=False)

    def group_of(self, entry_id: int) -> int:
        return self._groups.get(entry_id, entry_id)

    def refuse(self, asked: bytes, kept: bytes) -> None:
        """Never serve the entry of fingerprint `kept` for the question of fingerprint `asked` again."""
        self.epoch += 1
        self._refused[(asked, kept)] = None
        if len(self._refused) > REFUSED:
            self._refused.popitem(last=False)
            self.knows_all_refused = False

    def allow(self, asked: bytes, kept: bytes) -> None:
        """Undo `refuse`."""
        self._refused.pop((asked, kept), None)

    def is_refused(self, asked: bytes, kept: bytes) -> bool:
        """Whether memory has it; while not `knows_all_refused`, SQL may have it all the same."""
        return (asked, kept) in self._refused

    @property
    def refused_pairs(self) -> int:
        return len(self._refused)

    def shed(self) -> None:
        """Drop most of what can be read back: all but the installation and the levels used last."""
        if self._note is None:
            return
        for kind, levels in self._levels.items():
            while len(levels) > max(1, self._limits[kind] // KEPT_SHARE):
                levels.popitem(last=False)

    # -- what is written down -----------------------------------------------------------------------------------------

    def unread(self, place: Place | None = None) -> list[LevelName]:
        """Levels that something may be written down of that is not known: of a place, or of all in memory."""
        if self._note is None:
            return []
        if place is None:
            return [name for levels in self._levels.values() for name, level in levels.items() if not level.is_whole]
        found = ((name, self._levels[name.kind].get(name)) for name in place.levels)
        return [name for name, level in found if level is None or not level.is_whole]

    def lacks_rows(self, name: LevelName, written: Tally) -> bool:
        """Whether a level has labels enough to be judged by, and its learner has not seen them."""
        level = self._levels[name.kind].get(name)
        return written.labelled >= THICK and (level is None or level.learner.labelled < THICK)

    def restore(self, name: LevelName, written: Tally, learner: ports.Learner | None = None) -> None:
        """Take what is written down of a level, which is all that was noted of it so far; and a learner of its
        comparisons, where its own lacks them."""
        level = self._level(name)
        level.labelled = int(written.labelled)
        level.account = Account.of(written)
        level.thresholds.clear()
        if learner is not None:
            level.learner = learner
        level.is_whole = True

    # -- looking in -------------------------------------------------------------------------------------------------

    def status(self, kinds: Iterable[str] = ("installation", "namespace", "scope")) -> list[dict[str, Any]]:
        """Evidence level by level: hits, the share of wrong ones, the comparer's errors, thresholds, labels."""
        rows = []
        max_error, alpha = self.rules.max_error_rate, self.rules.alpha
        for kind in kinds:
            for name, level in self._levels[kind].items():
                bounds, account = level.bounds(max_error, alpha, self._steps, self._noise), level.account
                rows.append(
                    {
                        "level": kind,
                        "name": name.shown,
                        "labelled": level.labelled,
                        "hits": round(account.hits, 1),
                        "audited": account.audited,
                        "wrong": round(account.counted_wrong, 3),
                        "expected_wrong": round(account.expected_wrong(max_error), 3),
                        "error_rate": round(account.counted_wrong / account.audited, 6) if account.audited else None,
                        "upper_bound": round(risk.upper_bound(account.audited, account.counted_wrong, alpha), 6),
                        "proven_from": finite(bounds.proven),
                        "provisional_from": finite(bounds.provisional),
                        "has_room": account.has_room(max_error),
                        "comparer": comparer_shown(level.noise.after(self._noise), level.noise),
                        "regions": {
                            region: self._region_shown(account.region(region), region, level.noise.after(self._noise))
                            for region in (NORMAL, ALIKE)
                        },
                    }
                )
        return rows

    def _region_shown(self, region: Region, name: str, noise: Noise) -> dict[str, Any]:
        share, low, high = share_wrong(region.pairs, noise, self.rules.alpha)
        max_error = self.rules.max_error_rate
        return {
            "labels": round(region.n, 1),
            "wrong": round(region.wrong, 3),
            "pairs": region.pairs.n,
            "share_wrong": round(share, 6) if region.pairs.n else None,
            "interval": [round(low, 6), round(high, 6)],
            "closed": region.is_closed(max_error, noise, self.rules.alpha),
        }

    def evidence(self, place: Place, max_error: float) -> dict[str, Any]:
        """Counts behind one lookup: labelled decisions and wrong ones at each level of log-odds, and their bound; what
        the scope's regions showed; and in a sentence, whether the next look-alike would be served."""
        name, level = self._evidence(place)
        counts, scope, noise = level.learner.levels(), self._level(place.levels[0]), self.noise_of(place)
        return {
            "level": name or "none",
            "labelled": level.labelled,
            "max_error": max_error,
            "alpha": self.rules.alpha,
            "hits": round(scope.account.hits, 1),
            "has_room": scope.account.has_room(max_error, self._caution(place, max_error)),
            "comparer": comparer_shown(noise, scope.noise),
            "regions": {n: self._region_shown(scope.account.region(n), n, noise) for n in (NORMAL, ALIKE)},
            "outlook": self.outlook(place, max_error),
            "curve": [
                {
                    "log_odds": step,
                    "decisions": n,
                    "wrong": round(wrong, 3),
                    "noisy": noisy,
                    "alarms": alarms,
                }
                for step, n, wrong, noisy, alarms in zip(
                    self._steps, counts.n, counts.wrong, counts.noisy, counts.alarms, strict=True
                )
                if n or noisy
            ],
        }

    def outlook(self, place: Place, max_error: float) -> str:
        """Why the next look-alike would, or would not, be served here, in one sentence."""
        account, noise = self._level(place.levels[0]).account, self.noise_of(place)
        share = f"{100 * max_error:g} %"
        if self.unread(place):
            return "Nothing is served: what is written down of this scope has not been read yet."
        if not account.has_room(max_error, self._caution(place, max_error)):
            return f"Nothing without proof is served: {account.counted_wrong:g} hits are known to be wrong here."
        open_regions = self._open_regions(place, max_error)
        if ALIKE in open_regions:
            terms = f"A look-alike is served if guards and similarity put it within {share}"
            if not account.alike.pairs.n:
                return f"{terms}: no hit was audited yet."
            found, low, high = (100 * value for value in share_wrong(account.alike.pairs, noise, self.rules.alpha))
            audits = f"{account.alike.pairs.n:g} audits"
            return f"{terms}: {audits} estimate {found:.2g} % wrong ({low:.2g} to {high:.2g} %)."
        if account.alike.is_closed(max_error, noise, self.rules.alpha):
            found = share_wrong(account.alike.pairs, noise, self.rules.alpha)[0]
            return f"No look-alike is served: audits show that more than {share} is wrong, about {100 * found:.2g} %."
        return f"No look-alike is served without proof: known labels do not put the share of wrong within {share} yet."

    def _evidence(self, place: Place) -> tuple[str, Level]:
        """The finest level with enough labels; ("", the scope's) when none has."""
        for name in place.levels:
            level = self._levels[name.kind].get(name)
            if level is not None and level.labelled >= THICK:
                return name.kind, level
        return "", self._level(place.levels[0])

    def _all(self, place: Place) -> list[Level]:
        return [self._level(name) for name in place.levels]

    @contextmanager
    def _changing(self, name: LevelName, own: bool = True) -> Iterator[Level]:
        """A level whose tally changes inside, which is noted when it is ours to tell."""
        level = self._level(name)
        before = level.tally
        yield level
        if own and self._note is not None:
            self._note(name, level.tally.minus(before))

    def _level(self, name: LevelName) -> Level:
        levels = self._levels[name.kind]
        level = levels.get(name)
        if level is None:
            if len(levels) >= self._limits[name.kind]:
                levels.popitem(last=False)
            level = levels[name] = Level(self.new_learner(), is_whole=self._note is None)
        else:
            levels.move_to_end(name)
        return level


def place_of(found: Comparison) -> Place:
    """Where a comparison was made."""
    return Place(found.scope, found.namespace, found.tenant, found.fingerprint)


def learn(learner: ports.Learner, found: Comparison, weight: float) -> None:
    """Have a learner learn from a comparison, for as many decisions."""
    row = np.frombuffer(found.features, np.float32).astype(np.float64)
    words = np.frombuffer(found.words, np.int16).astype(np.int64)
    certain = is_certain(found)
    wrong = float(found.p_same < WRONG_BELOW) if certain else 1.0 - found.p_same
    learner.learn(row, words, found.group_id, wrong, weight, certain)


def is_certain(found: Comparison) -> bool:
    """Whether a label does not err: by somebody who knows, or of answers equal to the letter."""
    return found.comparer == FEEDBACK or found.p_same >= EQUAL


def pair_of(p_same: float, p_null: float) -> Pairs:
    """What one audit and its repeat showed: probabilities that the new answer, and that the kept question's own repeat,
    say what the kept answer says."""
    alarm, null = p_same < WRONG_BELOW, p_null < WRONG_BELOW
    return Pairs(float(alarm and not null), float(null and not alarm), float(alarm == null))


class _About(TypedDict):
    served: bool
    would_be: bool
    region: str


def _about(found: Comparison) -> _About:
    return {"served": found.served, "would_be": bool(found.standing), "region": found.region}


def comparison(
    opinion: Opinion,
    judged: Judged,
    *,
    p_same: float,
    weight: float,
    served: bool,
    comparer: str = FEEDBACK,
    p_null: float | None = None,
    source: str,
    request_id: str,
    embedder: str,
    ts_ms: int,
) -> Comparison:
    """What is kept of a label, so that it can be applied again."""
    place, is_refused = opinion.place, judged.candidate.entry_id in opinion.refused
    is_would_be = judged.standing is not None and not is_refused
    return Comparison(
        ts_ms=ts_ms,
        source=source,
        request_id=request_id,
        tenant=place.tenant,
        namespace=place.namespace,
        scope=place.scope,
        fingerprint=place.fingerprint,
        embedder=embedder,
        entry_id=judged.candidate.entry_id,
        group_id=judged.group_id,
        similarity=judged.candidate.similarity,
        log_odds=judged.log_odds,
        standing=judged.standing.value if is_would_be and judged.standing is not None else "",
        served=served,
        region="" if is_refused else judged.region,
        comparer=comparer,
        p_same=p_same,
        p_null=p_null,
        weight=weight,
        features=judged.row.astype(np.float32).tobytes(),
        words=judged.words.astype(np.int16).tobytes(),
        signature=opinion.signature.astype("<u8").tobytes(),
    )


def signature_from(raw: bytes) -> ports.Signature:
    """The signature that `comparison` kept."""
    return np.frombuffer(raw, "<u8").astype(np.uint64)


def verdict_of(opinion: Opinion, near_floor: float) -> NearMiss | Miss:
    """What to tell when nothing of an opinion is served: the candidate it was about, and what stood against it."""
    if not opinion.judged:
        return Miss("no_candidate")
    judged = opinion.guarded or opinion.decision or opinion.judged[0]
    if judged.candidate.similarity < near_floor:
        return Miss("nothing_alike")
    reason = opinion.refused.get(judged.candidate.entry_id, judged.reason)
    return NearMiss(judged.candidate.entry_id, judged.candidate.similarity, judged.probability, reason)


def objection(opinion: Opinion, judged: Judged, judge: Judge, *, can_verify: bool) -> str | None:
    """Why the pair guard is against serving this, "" when it is not; None: it has to be asked, and its logit noted in
    `opinion.logits`. It speaks for a pair in one place alone: where what was measured of such pairs lies within the
    budget.

    A model without a guard serves on evidence alone: the likeness of the start region was measured beside one.
    """
    if judged.candidate.normal:
        return ""  # its words are the same
    if not judge.rules.pair_guard:
        return suspicion_of(judged.candidate.vetoes) if judged.by_guard else ""
    if not can_verify:
        return "no_guard" if judged.standing is Standing.START else ""
    logit = opinion.logits.get(judged.candidate.entry_id)
    if logit is None:
        return None if opinion.may_ask else "pair_guard"
    if logit <= 0.0:
        return "pair_guard"
    if judged.by_guard:
        assert judge.prior is not None
        if not judge.prior(judged.candidate.similarity, logit, opinion.max_error):
            return suspicion_of(judged.candidate.vetoes)
    return ""


def suspicion_of(vetoes: int) -> str:
    """The first guard that suspects another question, "below_bound" when none does."""
    suspected = vetoes & HARD
    return GUARDS[(suspected & -suspected).bit_length() - 1] if suspected else "below_bound"


def comparer_shown(noise: Noise, seen: Noise) -> dict[str, Any]:
    """What is known of a comparer's errors."""
    return {
        "false_alarm_rate": round(noise.false_alarm_rate, 4),
        "repeats": seen.repeats,
        "miss_rate": round(noise.miss_rate, 4),
        "differing": seen.differing,
    }


def probability_of(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, log_odds))))


def finite(log_odds: float) -> float | None:
    return None if math.isinf(log_odds) else log_odds
