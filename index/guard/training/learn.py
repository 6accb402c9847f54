"""The alignment head in torch: fitting it, and scoring many pairs at once. `head` computes the same without torch.

torch is imported by name inside functions, so that importing this module loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from index.guard.training.generate import Pair
from index.quiet import library

Weights = dict[str, NDArray[np.float32]]
Half = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is fitted and how. A visit is one pair seen once."""

    visits: int = 160_000
    wholes: bool = False  # whether the head sees how alike the texts are as wholes
    width: int = 160
    batch: int = 64
    rate: float = 1.2e-3
    decay: float = 0.02
    warm_up: float = 0.06  # share of the visits
    averaging: float = 0.998  # of the weights, per step
    seed: int = 0


@dataclass(slots=True)
class States:
    """Token states of many texts: `flat` (tokens, layers, dimension) float16, unit rows; `place` text → first, last."""

    flat: Half
    place: Mapping[str, tuple[int, int]]

    @classmethod
    def joined(cls, parts: Sequence[States]) -> States:
        place: dict[str, tuple[int, int]] = {}
        at = 0
        for part in parts:
            place |= {text: (first + at, last + at) for text, (first, last) in part.place.items()}
            at += len(part.flat)
        return cls(np.concatenate([part.flat for part in parts]), place)

    def of(self, text: str) -> Half | None:
        """(tokens, layers, dimension); None for a text that the guard has no opinion on."""
        return self.flat[slice(*self.place[text])] if text in self.place else None

    def lengths(self, pairs: Sequence[Pair]) -> NDArray[np.int64]:
        """Tokens of the longer side of each pair."""
        return np.array([max(self._length(pair.a), self._length(pair.b)) for pair in pairs])

    def _length(self, text: str) -> int:
        first, last = self.place[text]
        return last - first

    def side(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """(texts, tokens, layers, dimension), zero behind each text's end; and which tokens are there."""
        spans = [self.place[text] for text in texts]
        longest = max(last - first for first, last in spans)
        out = np.zeros((len(texts), longest, *self.flat.shape[1:]), dtype=np.float32)
        there = np.zeros((len(texts), longest), dtype=bool)
        for row, (first, last) in enumerate(spans):
            out[row, : last - first] = self.flat[first:last]
            there[row, : last - first] = True
        return out, there


def build(layers: int, dimension: int, recipe: Recipe) -> Any:
    """The head as a torch module; its parameter names are those of the weight file."""
    torch = library("torch")
    nn = torch.nn
    width = recipe.width
    wholes = layers if recipe.wholes else 0

    class Head(nn.Module):  # type: ignore[misc, name-defined]  # torch is imported by name
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(layers * dimension, width)
            self.norm = nn.LayerNorm(width)
            self.key = nn.Linear(width, width, bias=False)
            self.beta = nn.Parameter(torch.full((layers,), 4.0))
            self.compare = nn.Linear(4 * width + 2 * layers + 2, width)
            self.refine = nn.Linear(width, width)
            self.judge = nn.Linear(6 * width + wholes, width)
            self.verdict = nn.Linear(width + wholes, 1)
            self.drop = nn.ModuleList([nn.Dropout(share) for share in (0.1, 0.15, 0.2)])

        def forward(self, xa: Any, ma: Any, xb: Any, mb: Any) -> Any:
            ha, hb = (self.drop[0](self.norm(self.project(x.flatten(2) * dimension**0.5))) for x in (xa, xb))
            cosines = torch.einsum("bild,bjld->blij", xa, xb)
            match = self.key(ha) @ self.key(hb).transpose(1, 2) / width**0.5
            match = match + torch.einsum("blij,l->bij", cosines, self.beta)
            hidden = ~(ma[:, :, None] & mb[:, None, :])
            match = match.masked_fill(hidden, -1e4)
            cosines = cosines.masked_fill(hidden[:, None], -1.0)
            pa = self._pool(ha, hb, match, cosines, ma)
            pb = self._pool(hb, ha, match.transpose(1, 2), cosines.transpose(2, 3), mb)
            whole = (4 * nn.functional.cosine_similarity(xa.sum(1), xb.sum(1), dim=2) - 2)[:, :wholes]
            judged = nn.functional.gelu(self.judge(torch.cat([pa + pb, (pa - pb).abs(), whole], 1)))
            return self.verdict(torch.cat([self.drop[2](judged), whole], 1))[:, 0]

        def _pool(self, mine: Any, theirs: Any, match: Any, cosines: Any, there: Any) -> Any:
            attention = match.softmax(2)
            found = attention @ theirs
            best = cosines.amax(3).transpose(1, 2)
            attended = torch.einsum("bij,blij->bil", attention, cosines)
            parts = [mine, found, (mine - found).abs(), mine * found, best, attended, self._order(attention, there)]
            compared = torch.cat(parts, 2)
            tokens = self.refine(self.drop[1](nn.functional.gelu(self.compare(compared))))
            tokens = tokens * there[:, :, None]
            total = tokens.sum(1)
            most = tokens.masked_fill(~there[:, :, None], -1e4).amax(1)
            return torch.cat([total / there.sum(1, keepdim=True), most, total / 8], 1)

        def _order(self, attention: Any, there: Any) -> Any:
            """How far each token's neighbours are from being neighbours on the other side: 0 where order is kept."""
            where = attention @ torch.arange(attention.shape[2], dtype=attention.dtype)
            jump = torch.tanh((where[:, 1:] - where[:, :-1] - 1) / 2) * there[:, 1:]
            pad = nn.functional.pad
            return torch.stack([pad(jump, (1, 0)), pad(jump, (0, 1))], 2)

    return Head()


def _batches(lengths: NDArray[np.int64], size: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Every pair once, those of like length together, in random order."""
    order = rng.permutation(len(lengths))
    chunks = [order[i : i + size * 40] for i in range(0, len(order), size * 40)]
    for chunk in chunks:
        sorted_chunk = chunk[np.argsort(lengths[chunk], kind="stable")]
        batches = [sorted_chunk[i : i + size] for i in range(0, len(sorted_chunk), size)]
        for i in rng.permutation(len(batches)):
            yield batches[i]


def _tensors(pairs: Sequence[Pair], states: States) -> list[Any]:
    torch = library("torch")
    sides = (states.side([pair.a for pair in pairs]), states.side([pair.b for pair in pairs]))
    return [torch.from_numpy(array) for side in sides for array in side]


def fit(
    pairs: Sequence[Pair], states: States, recipe: Recipe, report: Callable[[str], None] = lambda line: None
) -> Any:
    """The fitted module, its weights averaged over the last steps. One seed, one thread: the same weights each time."""
    torch = library("torch")
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    _, layers, dimension = states.flat.shape
    model = build(layers, dimension, recipe)
    averaged = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, weight_decay=recipe.decay)
    lengths = states.lengths(pairs)
    labels = np.array([pair.label for pair in pairs], dtype=np.float32)
    steps = recipe.visits // recipe.batch
    warm_up = max(1, int(steps * recipe.warm_up))
    model.train()
    step, losses = 0, []
    while step < steps:
        for rows in _batches(lengths, recipe.batch, rng):
            share = min(1.0, (step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * share
            logits = model(*_tensors([pairs[i] for i in rows], states))
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(labels[rows]))
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            kept = min(recipe.averaging, (step + 1) / (step + 10))
            with torch.no_grad():
                for name, value in model.state_dict().items():
                    averaged[name].lerp_(value, 1 - kept)
            losses.append(float(loss.detach()))
            step += 1
            if step % 500 == 0:
                report(f"step {step}/{steps} loss {np.mean(losses[-500:]):.4f}")
            if step == steps:
                break
    model.load_state_dict(averaged)
    return model.eval()


def score(model: Any, pairs: Sequence[Pair], states: States) -> NDArray[np.float32]:
    """Logits, (len(pairs),)."""
    torch = library("torch")
    out = np.zeros(len(pairs), dtype=np.float32)
    order = np.argsort(states.lengths(pairs), kind="stable")
    with torch.inference_mode():
        for i in range(0, len(order), 64):
            rows = order[i : i + 64]
            out[rows] = model(*_tensors([pairs[k] for k in rows], states)).numpy()
    return out
