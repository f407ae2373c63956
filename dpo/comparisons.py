"""Which comparisons a prompt with several scored or ranked completions gives: pairs, or one ranking.

Everything here works on scores (higher is better) and indices of completions. Ties, and pairs closer than the minimum
gap, are no comparisons: they are left out and counted.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product
from typing import Literal

from dpo.chat import BadRow
from dpo.errors import UserError

Kind = Literal["all", "best-vs-worst", "best-vs-rest", "adjacent", "random", "ranking"]
Pair = tuple[int, int]

LARGEST_TIE = 3
"""Completions of equal score in a ranking whose orders are averaged; a larger tie has too many."""


class NoComparison(BadRow):
    """A sound row that compares nothing: counted, but no bad row."""


@dataclass(frozen=True)
class Comparisons:
    """What is compared. min_gap: least difference of two scores (or ranks) that makes a pair. top_k: only the first
    places of a ranking are choices, what follows is merely worse. seed: of the pairs drawn by `random`."""

    kind: Kind = "all"
    min_gap: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.min_gap >= 0:
            raise UserError(f"--min-score-gap: expected zero or more, found {self.min_gap}")
        if self.min_gap and self.kind == "ranking":
            raise UserError(
                f"--min-score-gap: expected 0 with --comparisons ranking (which orders all completions), "
                f"found {self.min_gap:g}"
            )
        if self.top_k is not None and self.kind != "ranking":
            raise UserError(f"--ranking-top-k: expected --comparisons ranking beside it, found {self.kind}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--ranking-top-k: expected a positive number, found {self.top_k}")

    @property
    def asks_for_scores(self) -> bool:
        """Whether this is more than pairs as they are, so that data without scores cannot give it."""
        return self != Comparisons(seed=self.seed)


@dataclass(frozen=True, slots=True)
class Candidates:
    """All pairs of a row that differ enough, (better, worse), ordered by the smaller, then the larger index; and how
    many of those that the kind asks for were left out: ties of equal score, and closer than the minimum gap."""

    pairs: list[Pair]
    ties: int
    close: int


def candidates(scores: Sequence[float], comparisons: Comparisons) -> Candidates:
    """The pairs to choose from. Raises NoComparison when there is none."""
    pairs = [
        (i, j) if scores[i] > scores[j] else (j, i)
        for i, j in combinations(range(len(scores)), 2)
        if scores[i] != scores[j] and abs(scores[i] - scores[j]) >= comparisons.min_gap
    ]
    if not pairs:
        tied = len(set(scores)) == 1
        raise NoComparison("all scores tie" if tied else f"no two scores {comparisons.min_gap:g} apart")
    gaps = [abs(scores[i] - scores[j]) for i, j in _asked(scores, comparisons.kind)]
    ties = sum(gap == 0 for gap in gaps)
    return Candidates(pairs, ties, sum(0 < gap < comparisons.min_gap for gap in gaps))


def _asked(scores: Sequence[float], kind: Kind) -> list[Pair]:
    """Index pairs that the kind would compare if nothing tied."""
    order = _order(scores, range(len(scores)))
    if kind in ("all", "ranking"):
        return list(combinations(order, 2))
    if kind == "best-vs-rest":
        return [(order[0], other) for other in order[1:]]
    return list(pairwise(order)) if kind == "adjacent" else []


def choose_pairs(pairs: Sequence[Pair], scores: Sequence[float], comparisons: Comparisons, row: int) -> list[Pair]:
    """The pairs that the kind asks for, out of the candidates that are left of a row.

    `best` is the first of equally good completions in the order of the data. best-vs-worst: the candidate with the
    largest gap. adjacent: neighbours when sorted by score. random: one candidate, drawn with the seed and the row's
    number, so that it is the same in every epoch. Raises NoComparison when none is left.
    """
    if comparisons.kind in ("all", "ranking"):
        return list(pairs)
    if comparisons.kind == "best-vs-worst":
        return [max(pairs, key=lambda pair: scores[pair[0]] - scores[pair[1]])]
    if comparisons.kind == "random":
        return [random.Random(f"{comparisons.seed} {row}").choice(pairs)]
    order = _order(scores, sorted({index for pair in pairs for index in pair}))
    if comparisons.kind == "best-vs-rest":
        found = [pair for pair in pairs if pair[0] == order[0]]
    else:
        neighbours = set(pairwise(order))
        found = [pair for pair in pairs if pair in neighbours]
    if not found:
        raise NoComparison(f"no pair left that is {comparisons.kind}")
    return found


def _order(scores: Sequence[float], indices: Sequence[int]) -> list[int]:
    """Best first; equal scores in the order of the data."""
    return sorted(indices, key=lambda index: (-scores[index], index))


def rank(indices: Sequence[int], scores: Sequence[float], top_k: int | None = None) -> list[list[int]]:
    """Every order of `indices` from best to worst that the scores allow: one, or the orders of tied completions.

    Ties that lie beyond the first `top_k` places stay in one order, which does not matter there. Raises NoComparison
    for more than LARGEST_TIE completions of equal score.
    """
    levels: list[list[int]] = []
    for index in _order(scores, indices):
        if levels and scores[levels[-1][0]] == scores[index]:
            levels[-1].append(index)
        else:
            levels.append([index])
    orders, place = [], 0
    for level in levels:
        matters = top_k is None or place < top_k
        if matters and len(level) > LARGEST_TIE:
            raise NoComparison(f"more than {LARGEST_TIE} equal scores in a ranking")
        orders.append([list(order) for order in permutations(level)] if matters else [level])
        place += len(level)
    return [[index for level in choice for index in level] for choice in product(*orders)]


def decided_pairs(pairs: Sequence[Pair], orders: Sequence[Sequence[int]], top_k: int | None) -> list[Pair]:
    """The pairs of different score that a ranking decides: with `top_k`, those whose better side is among the first
    places. They carry the metrics (accuracy, margin, rewards) of a ranking."""
    if top_k is None:
        return list(pairs)
    first = {index for order in orders for index in order[:top_k]}
    return [pair for pair in pairs if pair[0] in first]
