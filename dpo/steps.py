"""The first three stages of a step: draw its groups, fix its normalisation, pack it into bins.

What is in a step depends on the seed and on how many pairs each group has, never on lengths, budget or layout.
C completions, T pairs of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from dpo.balance import Cost, balanced_bins
from dpo.packing import Group, Layout, PackedBatch, group_cost, pack, plan_groups, ranking_table, split_group
from dpo.rng import seed_all

Reduction = Literal["pairs", "prompts"]


class Preferences(Protocol):
    """What a step needs of the data; `dpo.data.PreferenceData` and a list of groups with `num_pairs` both do."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Group: ...
    def num_pairs(self, index: int, /) -> int: ...


@dataclass(frozen=True)
class Bin:
    """One forward pass: a packed batch, and where its completions stand in the data and in its step."""

    batch: PackedBatch
    members: tuple[tuple[int, tuple[int, ...]], ...]
    """(index of the group in the data, which of its completions), in the order of the batch. Nothing: an empty bin,
    which runs one dummy token so that this rank takes part in what the others do, and has no pairs."""
    completions: Tensor
    """[completions of the batch] int64: their numbers in `Coupled`; empty where nothing is coupled."""

    def to(self, device: torch.device) -> Bin:
        """The same bin on `device`."""
        batch = self.batch.to(device, non_blocking=True)
        return Bin(batch, self.members, self.completions.to(device, non_blocking=True))

    def pin_memory(self) -> Bin:
        """The same bin in page-locked memory."""
        return Bin(self.batch.pin_memory(), self.members, self.completions.pin_memory())


@dataclass(frozen=True)
class Coupled:
    """Comparisons whose completions lie in different bins: they need the two-phase form.

    The bins are this rank's, the comparisons and the numbers of completions those of all ranks.
    """

    bins: tuple[Bin, ...]
    chosen: Tensor
    """[T] int64, numbers of completions."""
    rejected: Tensor
    """[T] int64."""
    pair_weights: Tensor
    """[T] float64."""
    num_completions: int
    rankings: Tensor | None = None
    """[R, K] int64, numbers of completions, padded with -1."""
    ranking_weights: Tensor | None = None
    """[R] float64."""
    groups: tuple[int, ...] = ()
    """Indices in the data, in the order of the pairs."""

    def to(self, device: torch.device) -> Coupled:
        """The same comparisons and bins on `device`."""
        return self._map(tuple(b.to(device) for b in self.bins), lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Coupled:
        """The same comparisons and bins in page-locked memory."""
        return self._map(tuple(b.pin_memory() for b in self.bins), lambda t: t.pin_memory())

    def _map(self, bins: tuple[Bin, ...], function: Callable[[Tensor], Tensor]) -> Coupled:
        changed: dict[str, Any] = {k: function(v) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, bins=bins, **changed)


@dataclass(frozen=True)
class StepBatch:
    """Everything a step computes on this rank: bins that stand alone, and those coupled by their comparisons.

    The numbers are those of the whole step.
    """

    index: int
    epoch: int
    bins: tuple[Bin, ...]
    coupled: Coupled | None
    num_pairs: int
    num_comparisons: int
    """What the loss is a mean over: the pairs, or the rankings."""
    num_tokens: int
    num_groups: int
    fill: float
    """Tokens over bins * budget, of all ranks."""
    share: float = 1.0
    """Weight of this step's loss in the whole that it is a part of (evaluation runs in chunks)."""

    def to(self, device: torch.device) -> StepBatch:
        """The same step on `device`."""
        coupled = self.coupled.to(device) if self.coupled else None
        return replace(self, bins=tuple(b.to(device) for b in self.bins), coupled=coupled)

    def pin_memory(self) -> StepBatch:
        """The same step in page-locked memory (called by torch's DataLoader)."""
        coupled = self.coupled.pin_memory() if self.coupled else None
        return replace(self, bins=tuple(b.pin_memory() for b in self.bins), coupled=coupled)

    @property
    def all_bins(self) -> tuple[Bin, ...]:
        return self.bins + (self.coupled.bins if self.coupled else ())


@dataclass(frozen=True)
class StepPlan:
    """How groups become steps and steps become bins."""

    pairs_per_step: int = 64
    groups_per_step: int | None = None
    reduction: Reduction = "pairs"
    token_budget: int = 8192
    layout: Layout = "shared"
    two_phase: bool = False
    seed: int = 0
    length_limit: int | None = None
    """Sequences up to so many tokens and longer ones never share a bin (`dpo.support.length_limit`)."""
    ranks: int = 1
    rank: int = 0
    """Which of `ranks` this process is: it packs its own bins only."""
    cost: Cost = field(default_factory=Cost)
    """What balances the bins of several ranks."""


def draw_epoch(pairs: Sequence[int], plan: StepPlan, epoch: int) -> list[list[int]]:
    """Draws the steps of one epoch: a seeded permutation of the groups, cut into steps.

    A step takes groups until the next would bring it over `pairs_per_step` (at least one), or `groups_per_step`.

    Args:
        pairs: number of pairs of each group; a ranking counts as one.
    """
    order = np.random.default_rng([plan.seed, epoch]).permutation(len(pairs)).tolist()
    if plan.groups_per_step is not None:
        return [order[i : i + plan.groups_per_step] for i in range(0, len(order), plan.groups_per_step)]
    steps: list[list[int]] = []
    held = plan.pairs_per_step
    for group in order:
        if held + pairs[group] > plan.pairs_per_step:
            steps.append([])
            held = 0
        steps[-1].append(group)
        held += pairs[group]
    return steps


def pair_weights(pairs: Sequence[int], reduction: Reduction) -> list[float]:
    """Weight of one pair of each group (of the ranking of a group that has one, which counts as one pair): a step's
    loss is the weighted sum over its comparisons, in whatever bins."""
    if reduction == "pairs":
        return [1.0 / sum(pairs)] * len(pairs)
    return [1.0 / (len(pairs) * count) for count in pairs]


def build_step(
    data: Preferences, groups: Sequence[int], plan: StepPlan, *, index: int = 0, epoch: int = 0
) -> StepBatch:
    """Normalises and packs one step.

    Groups that fit the budget are packed whole. A larger one is cut into parts that repeat its prompt, and its pairs go
    through the two-phase form, as all pairs do where the plan asks for it.

    Raises:
        UserError: one prompt with one completion exceeds the budget.
    """
    held = [data[i] for i in groups]
    weights = pair_weights([group.num_comparisons for group in held], plan.reduction)
    fits = [
        group_cost(group, plan.layout) <= plan.token_budget and len(_regimes(group, plan.length_limit)) == 1
        for group in held
    ]
    whole = [k for k, fit in enumerate(fits) if fit and not plan.two_phase]
    apart = [k for k in range(len(held)) if k not in set(whole)]
    parts = [_Part(k, tuple(range(len(held[k].completions))), held[k]) for k in whole]
    packed = _pack_parts(parts, groups, plan)
    bins = list(packed.bins)
    position = {group: k for k, group in enumerate(groups)}
    for k, b in enumerate(bins):
        places = [position[i] for i, _ in b.members]
        for_pairs, for_rankings = _weights_of([held[p] for p in places], [weights[p] for p in places])
        batch = replace(b.batch, pair_weights=for_pairs, ranking_weights=for_rankings)
        bins[k] = replace(b, batch=batch)
    coupled, apart_packed = None, _Packed([], 0)
    if apart:
        coupled, apart_packed = _couple([(k, held[k]) for k in apart], groups, weights, plan)
    tokens = packed.tokens + apart_packed.tokens
    room = (len(packed.bins) + len(apart_packed.bins)) * plan.ranks * plan.token_budget
    return StepBatch(
        index=index,
        epoch=epoch,
        bins=tuple(bins),
        coupled=coupled,
        num_pairs=sum(len(group.pairs) for group in held),
        num_comparisons=sum(group.num_comparisons for group in held),
        num_tokens=tokens,
        num_groups=len(held),
        fill=tokens / room if room else 0.0,
    )


@dataclass(frozen=True)
class _Part:
    """Some of a group's completions: the group's position in the step, which completions, a group of just these."""

    position: int
    completions: tuple[int, ...]
    group: Group


@dataclass(frozen=True)
class _Packed:
    """This rank's bins, and the tokens of all ranks' bins."""

    bins: list[Bin]
    tokens: int


def _pack_parts(parts: Sequence[_Part], groups: Sequence[int], plan: StepPlan) -> _Packed:
    """Packs parts into bins under the budget, the same number on every rank, and builds this rank's."""
    kinds = [_pack_alike(together, groups, plan) for together in _by_regime(parts, plan.length_limit)]
    return _Packed([b for kind in kinds for b in kind.bins], sum(kind.tokens for kind in kinds))


def _pack_alike(parts: Sequence[_Part], groups: Sequence[int], plan: StepPlan) -> _Packed:
    held = [part.group for part in parts]
    if plan.ranks == 1:
        everyone = [plan_groups(held, plan.token_budget, plan.layout).bins]
    else:
        rows = [len(group.completions) for group in held] if plan.layout == "padded" else None
        sizes = [group_cost(group, plan.layout) for group in held]
        costs = [plan.cost.of(group, plan.layout) for group in held]
        everyone = balanced_bins(sizes, costs, plan.token_budget, plan.ranks, rows=rows)
    tokens = sum(_tokens([held[m] for m in members], plan.layout) for bins in everyone for members in bins)
    return _Packed([_bin([parts[m] for m in members], groups, plan.layout) for members in everyone[plan.rank]], tokens)


def _bin(parts: Sequence[_Part], groups: Sequence[int], layout: Layout) -> Bin:
    batch = pack(
        [part.group for part in parts] or [_DUMMY],
        layout=layout,
        # the dummy's tokens are nobody's; a prompt counts where the group's first completion is
        counted_prompts=[0 in part.completions for part in parts] or None,
    )
    return Bin(
        batch=batch if parts else replace(batch, counted=torch.zeros_like(batch.counted)),
        members=tuple((groups[part.position], part.completions) for part in parts),
        completions=torch.empty(0, dtype=torch.int64),
    )


_DUMMY = Group([0], [[0]], ())


def _tokens(held: Sequence[Group], layout: Layout) -> int:
    if layout != "padded":
        return sum(group_cost(group, layout) for group in held)
    widest = max((group_cost(group, layout) // len(group.completions) for group in held), default=0)
    return widest * sum(len(group.completions) for group in held)


def _regimes(group: Group, limit: int | None) -> list[tuple[int, ...]]:
    """The group's completions, those apart that are longer than `limit` with the prompt."""
    everything = range(len(group.completions))
    if limit is None:
        return [tuple(everything)]
    within = tuple(i for i in everything if len(group.prompt) + len(group.completions[i]) <= limit)
    beyond = tuple(i for i in everything if i not in set(within))
    return [part for part in (within, beyond) if part]


def _by_regime(parts: Sequence[_Part], limit: int | None) -> list[list[_Part]]:
    if limit is None:
        return [list(parts)]
    longer = [len(part.group.prompt) + max(map(len, part.group.completions)) > limit for part in parts]
    return [[part for part, long in zip(parts, longer, strict=True) if long == side] for side in (False, True)]


def _weights_of(held: Sequence[Group], weights: Sequence[float]) -> tuple[Tensor, Tensor | None]:
    """[T] of the pairs of groups, and [R] of their rankings, where there are any: the orders of tied completions share
    the weight of their group."""
    weighted = list(zip(held, weights, strict=True))
    for_pairs = [weight for group, weight in weighted for _ in group.pairs]
    for_rankings = [weight / len(group.rankings) for group, weight in weighted for _ in group.rankings]
    rankings = torch.tensor(for_rankings, dtype=torch.float64) if for_rankings else None
    return torch.tensor(for_pairs, dtype=torch.float64), rankings


def _couple(
    apart: Sequence[tuple[int, Group]], groups: Sequence[int], weights: Sequence[float], plan: StepPlan
) -> tuple[Coupled, _Packed]:
    """Cuts groups into parts within the budget and numbers their completions across bins and ranks."""
    first: dict[int, int] = {}
    parts: list[_Part] = []
    chosen: list[int] = []
    rejected: list[int] = []
    total = 0
    for k, group in apart:
        first[groups[k]] = total
        chosen += [total + w for w, _ in group.pairs]
        rejected += [total + loser for _, loser in group.pairs]
        total += len(group.completions)
        for regime in _regimes(group, plan.length_limit):
            alike = replace(group, completions=[group.completions[i] for i in regime], pairs=(), rankings=())
            for part in split_group(alike, plan.token_budget, plan.layout):
                parts.append(_Part(k, tuple(regime[i] for i in part.completions), part.group))
    packed = _pack_parts(parts, groups, plan)

    def numbers(b: Bin) -> Tensor:
        # the dummy of an empty bin has a number of its own, which no comparison names
        return torch.tensor([first[i] + c for i, held in b.members for c in held] or [total], dtype=torch.int64)

    whole = [group for _, group in apart]
    for_pairs, for_rankings = _weights_of(whole, [weights[k] for k, _ in apart])
    coupled = Coupled(
        bins=tuple(replace(b, completions=numbers(b)) for b in packed.bins),
        chosen=torch.tensor(chosen, dtype=torch.int64),
        rejected=torch.tensor(rejected, dtype=torch.int64),
        pair_weights=for_pairs,
        num_completions=total + (plan.ranks > 1),
        rankings=ranking_table(whole, [first[groups[k]] for k, _ in apart]),
        ranking_weights=for_rankings,
        groups=tuple(groups[k] for k, _ in apart),
    )
    return coupled, packed


class StepDataset(Dataset[StepBatch]):
    """The steps of a run, each built when it is asked for: works in data workers, and from any step on."""

    def __init__(
        self, data: Preferences, plan: StepPlan, *, epochs: int | None = None, max_steps: int | None = None
    ) -> None:
        self.data, self.plan = data, plan
        pairs = [data.num_pairs(i) for i in range(len(data))]
        epochs = epochs or (1 if max_steps is None else None)
        self.steps: list[tuple[int, list[int]]] = []
        for epoch in count() if epochs is None else range(epochs):
            if max_steps is not None and len(self.steps) >= max_steps:
                break
            self.steps += [(epoch, step) for step in draw_epoch(pairs, plan, epoch)]
        self.steps = self.steps[:max_steps]

    def __len__(self) -> int:
        return len(self.steps)

    def first_uses(self, start: int = 0) -> list[int]:
        """The steps from `start` on that use a group for the first time: a pass over them sees every group."""
        seen: set[int] = set()
        uses = []
        for index in range(start, len(self.steps)):
            if not seen.issuperset(self.steps[index][1]):
                seen.update(self.steps[index][1])
                uses.append(index)
        return uses

    def __getitem__(self, index: int) -> StepBatch:
        if get_worker_info() is not None:
            seed_all(self.plan.seed, index)  # what a worker draws depends on the step, not on the worker
        epoch, groups = self.steps[index]
        return build_step(self.data, groups, self.plan, index=index, epoch=epoch)


def eval_steps(data: Preferences, plan: StepPlan, groups_per_chunk: int = 512) -> list[StepBatch]:
    """All of `data` in file order, in chunks that bound memory and that no mean over pairs depends on."""
    chunks = [range(i, min(i + groups_per_chunk, len(data))) for i in range(0, len(data), groups_per_chunk)]
    steps = [build_step(data, chunk, plan, index=i) for i, chunk in enumerate(chunks)]
    weights = [step.num_comparisons if plan.reduction == "pairs" else step.num_groups for step in steps]
    return [replace(step, share=weight / sum(weights)) for step, weight in zip(steps, weights, strict=True)]
