"""The judge: candidates in, one to serve or none out, with every reason. Learns from labels; no I/O, no clock.

Four levels hold evidence: the scope, the tenant's namespace, the tenant, the installation. Every label feeds all four;
a lookup is judged by the finest that has `THICK` labelled decisions, and by the start region alone while none has. The
account must have room in the scope and in the level used.

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
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from proxy import ports
from proxy.core import risk
from proxy.core.model import Candidate, Comparison, Miss, NearMiss, Rules
from proxy.core.policy import ALWAYS, GUARDS, HARD
from proxy.core.risk import Account, LevelName, Standing, Tally, Thresholds

THICK: Final = 100
REVIEW_EVERY: Final = 40  # labels
LEARN_FROM: Final = 0.60  # similarity; what is less alike teaches nothing
SAME_FROM: Final = 0.80  # probability from which an entry joins the group of the one it was compared with
WRONG_BELOW: Final = 0.50  # probability of being the same under which a decision counts as wrong
LIMITS: Final[Mapping[str, int]] = MappingProxyType({"scope": 256, "namespace": 64, "tenant": 64, "installation": 1})
"""Levels in memory, of each kind; the least recently used leave."""
GROUPS: Final = 200_000
KEPT_SHARE: Final = 8  # of the bound of levels, that stays when memory is short: one in so many
REFUSED: Final = 65_536  # refused pairs in memory; the others are looked for in SQL
GUARD_ASKS: Final = 3  # candidates of a lookup that the pair guard is asked about: each costs time
PAIR_GUARD: Final = "pair_guard"


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
    near_same: bool  # belongs to the start region
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
    held: str = ""  # why nothing without proof is served this time
    stands_for: float | None = None  # would-be hits like this one that its label speaks for; None: no audit is due

    @property
    def chosen(self) -> Judged | None:
        """The first that may be served."""
        for judged in self._left():
            if judged.standing is Standing.PROVEN or (judged.standing and self.has_room and not self.held):
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
        return would_be or allowed or next(iter(left), None)

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

    __slots__ = ("account", "is_whole", "labelled", "learner", "stale", "thresholds")

    def __init__(self, learner: ports.Learner, *, is_whole: bool) -> None:
        self.learner = learner
        self.is_whole = is_whole
        self.labelled = 0  # decisions that are evidence, ever
        self.account = Account()
        self.thresholds: dict[float, Thresholds] = {}
        self.stale = 0  # labels since the thresholds were derived

    @property
    def tally(self) -> Tally:
        account = self.account
        return Tally(
            self.labelled, account.hits, account.audited, account.counted_wrong, account.would_be,
            account.would_be_wrong, account.start, account.start_wrong,
        )  # fmt: skip

    def bounds(self, max_error: float, alpha: float, levels: Sequence[float]) -> Thresholds:
        found = self.thresholds.get(max_error)
        if found is None:
            if len(self.thresholds) > 16:  # clients may ask for any
                self.thresholds.clear()
            found = self.thresholds[max_error] = self._derive(max_error, alpha, levels)
        return found

    def review(self, alpha: float, levels: Sequence[float], *, wrong: bool) -> None:
        """Derive thresholds anew after a label: at once when it was a wrong mark, and then never a looser one."""
        self.stale += 1
        if self.stale >= REVIEW_EVERY and not wrong:
            self.stale = 0
            self.thresholds = {e: self._derive(e, alpha, levels) for e in self.thresholds}
        elif wrong:
            self.thresholds = {
                e: self._derive(e, alpha, levels).narrowed(before) for e, before in self.thresholds.items()
            }

    def _derive(self, max_error: float, alpha: float, levels: Sequence[float]) -> Thresholds:
        return risk.thresholds_of(levels, self.learner.levels(), max_error, alpha)


class Judge:
    """Lives on the event loop. `new_learner` makes an empty ports.Learner; `levels` are its levels of log-odds.

    `sensitivity` is the share of wrong answers that comparing answers finds: what it overlooks is taken off the budget.
    """

    def __init__(
        self,
        rules: Rules,
        new_learner: ports.NewLearner,
        levels: Sequence[float],
        sensitivity: float = 1.0,
        note: Note | None = None,
        limits: Mapping[str, int] = LIMITS,
    ) -> None:
        self.rules = rules
        self._note = note
        self.sensitivity = sensitivity
        self.epoch = 0  # rises when something was narrowed: what was remembered of earlier verdicts is void
        self.new_learner = new_learner
        self._steps = levels
        self._levels: dict[str, OrderedDict[LevelName, Level]] = {kind: OrderedDict() for kind in limits}
        self._limits = limits
        self._groups: OrderedDict[int, int] = OrderedDict()  # of entries whose group is not their own id
        self._refused: OrderedDict[tuple[bytes, bytes], None] = OrderedDict()
        self.knows_all_refused = True  # no refused pair was dropped from memory

    @property
    def feature_names(self) -> Sequence[str]:
        return self._level(INSTALLATION).learner.names

    # -- judging ----------------------------------------------------------------------------------------------------

    def consider(
        self, place: Place, signature: ports.Signature, candidates: Sequence[Candidate], max_error: float
    ) -> Opinion:
        """Judge candidates (descending similarity, each with its signature). `max_error` may only be tighter than the
        rules' own."""
        max_error *= self.sensitivity
        scope = self._level(place.levels[0])
        name, level = self._evidence(place)
        is_known = not self.unread(place)
        bounds = level.bounds(max_error, self.rules.alpha, self._steps) if name and is_known else Thresholds()
        has_room = is_known and scope.account.has_room(max_error) and level.account.has_room(max_error)
        if not candidates:
            return Opinion(place, signature, max_error, name, bounds, has_room, [])
        start_rate = max(scope.account.start_rate, self._start_evidence(place).start_rate) if is_known else 1.0
        groups = np.array([self.group_of(c.entry_id) for c in candidates], np.int64)
        similarities = np.array([c.similarity for c in candidates], np.float32)
        found = level.learner.consider(signature, np.stack([c.signature for c in candidates]), similarities, groups)
        judged = [self._judge(candidates[one.place], one, bounds, has_room, start_rate, max_error) for one in found]
        return Opinion(place, signature, max_error, name, bounds, has_room, judged)

    def _judge(
        self,
        candidate: Candidate,
        one: ports.Considered,
        bounds: Thresholds,
        has_room: bool,
        start_rate: float,
        max_error: float,
    ) -> Judged:
        vetoes = candidate.vetoes
        alike = candidate.similarity >= self.rules.start_similarity
        near_same = alike and not vetoes & HARD
        standing = risk.standing_of(
            one.log_odds,
            near_same=near_same,
            vetoed=bool(vetoes & ALWAYS) or not math.isfinite(candidate.similarity),
            thresholds=bounds,
            starts=start_rate <= max_error * (1 + 1e-9),  # the default budget is met exactly
        )
        if standing is not None:
            reason = standing.value if has_room or standing is Standing.PROVEN else "budget_spent"
        elif (objecting := vetoes & ALWAYS or vetoes & HARD) != 0:
            reason = GUARDS[(objecting & -objecting).bit_length() - 1]
        else:
            reason = "budget_spent" if near_same else "below_bound"
        probability = 1.0 - start_rate if standing is Standing.START else probability_of(one.log_odds)
        return Judged(
            candidate, one.group_id, one.log_odds, probability, standing, reason, near_same, one.row, one.words
        )

    def audit_share(self, opinion: Opinion, judged: Judged) -> float:
        """The share of such hits that must be asked again upstream."""
        assert judged.standing is not None
        place = opinion.place
        account = self._start_evidence(place) if judged.standing is Standing.START else self._evidence(place)[1].account
        return risk.audit_share(judged.standing, account, self.rules.audit_share)

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
        is_wrong = found.p_same < WRONG_BELOW
        is_evidence = found.weight > 0.0
        for name in place_of(found).levels:
            with self._changing(name, own) as level:
                learn(level.learner, found)
                if is_evidence:
                    level.labelled += 1
                    if level.labelled == THICK > level.learner.labelled and self._note is not None:
                        level.is_whole = False  # it was dropped in between: its learner has to see the others as well
                    level.account.label(
                        float(is_wrong),
                        found.weight,
                        served=found.served,
                        would_be=bool(found.standing),
                        near_same=found.near_same,
                    )
                    level.review(self.rules.alpha, self._steps, wrong=is_wrong)
        self.epoch += is_evidence and is_wrong

    def correct(self, found: Comparison, p_same: float) -> None:
        """Someone who knows says otherwise than this comparison, which was applied before."""
        if found.weight <= 0.0:
            return
        for name in place_of(found).levels:
            with self._changing(name) as level:
                level.account.correct(
                    float(found.p_same < WRONG_BELOW),
                    float(p_same < WRONG_BELOW),
                    found.weight,
                    served=found.served,
                    would_be=bool(found.standing),
                    near_same=found.near_same,
                )
                level.review(self.rules.alpha, self._steps, wrong=p_same < WRONG_BELOW)
        self.epoch += p_same < WRONG_BELOW

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
        level.account = Account(*written[1:])
        level.thresholds.clear()
        if learner is not None:
            level.learner = learner
        level.is_whole = True

    # -- looking in -------------------------------------------------------------------------------------------------

    def status(self, kinds: Iterable[str] = ("installation", "namespace", "scope")) -> list[dict[str, Any]]:
        """Evidence level by level: hits, known wrong, bound, thresholds, labels."""
        rows = []
        max_error, alpha = self.rules.max_error_rate * self.sensitivity, self.rules.alpha
        for kind in kinds:
            for name, level in self._levels[kind].items():
                bounds, account = level.bounds(max_error, alpha, self._steps), level.account
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
                        "start_rate": round(account.start_rate, 6),
                        "has_room": account.has_room(max_error),
                    }
                )
        return rows

    def evidence(self, place: Place, max_error: float) -> dict[str, Any]:
        """Counts behind one lookup: labelled decisions and wrong ones at each level of log-odds, and their bound."""
        name, level = self._evidence(place)
        counts = level.learner.levels()
        return {
            "level": name or "none",
            "labelled": level.labelled,
            "max_error": max_error,
            "sensitivity": self.sensitivity,
            "alpha": self.rules.alpha,
            "start_rate": round(max(level.account.start_rate, self._start_evidence(place).start_rate), 6),
            "has_room": level.account.has_room(max_error),
            "curve": [
                {
                    "log_odds": step,
                    "decisions": n,
                    "wrong": round(wrong, 3),
                    "upper_bound": round(risk.upper_bound(n, wrong, self.rules.alpha), 6),
                }
                for step, n, wrong in zip(self._steps, counts.n, counts.wrong, strict=True)
                if n
            ],
        }

    def _evidence(self, place: Place) -> tuple[str, Level]:
        """The finest level with enough labels; ("", the scope's) when none has."""
        for name in place.levels:
            level = self._levels[name.kind].get(name)
            if level is not None and level.labelled >= THICK:
                return name.kind, level
        return "", self._level(place.levels[0])

    def _start_evidence(self, place: Place) -> Account:
        """What is known of the start region: the finest level with enough of it, else the installation's."""
        for name in place.levels:
            level = self._levels[name.kind].get(name)
            if level is not None and (name == INSTALLATION or level.account.start >= risk.START_LABELS):
                return level.account
        return Account()

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


def learn(learner: ports.Learner, found: Comparison) -> None:
    """Have a learner learn from a comparison."""
    row = np.frombuffer(found.features, np.float32).astype(np.float64)
    words = np.frombuffer(found.words, np.int16).astype(np.int64)
    learner.learn(row, words, found.group_id, float(found.p_same < WRONG_BELOW), found.weight)


def teach(learner: ports.Learner, found: Comparison) -> None:
    """`learn`, of a question that this learner has not seen."""
    learner.see(signature_from(found.signature))
    learn(learner, found)


def comparison(
    opinion: Opinion,
    judged: Judged,
    *,
    p_same: float,
    weight: float,
    served: bool,
    source: str,
    request_id: str,
    embedder: str,
    ts_ms: int,
) -> Comparison:
    """What is kept of a label, so that it can be applied again."""
    place = opinion.place
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
        standing="" if judged.standing is None else judged.standing.value,
        served=served,
        near_same=judged.near_same,
        p_same=p_same,
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
    reason = opinion.refused.get(judged.candidate.entry_id, (judged.standing and opinion.held) or judged.reason)
    return NearMiss(judged.candidate.entry_id, judged.candidate.similarity, judged.probability, reason)


def objection(opinion: Opinion, judged: Judged, rules: Rules, *, can_verify: bool) -> str | None:
    """Why the pair guard is against serving this, "" when it is not; None: it has to be asked, and its logit noted in
    `opinion.logits`. It never speaks for anything.

    A model without a guard serves on evidence alone: the likeness of the start region was measured beside one.
    """
    if not rules.pair_guard:
        return ""
    if not can_verify:
        return "no_guard" if judged.standing is Standing.START else ""
    logit = opinion.logits.get(judged.candidate.entry_id)
    if logit is None:
        return None if opinion.may_ask else "pair_guard"
    return "" if logit > 0 else "pair_guard"


def probability_of(log_odds: float) -> float:
    return 1.0 / (1.0 + math.exp(-max(-30.0, min(30.0, log_odds))))


def finite(log_odds: float) -> float | None:
    return None if math.isinf(log_odds) else log_odds
