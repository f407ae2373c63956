"""Packing: preference groups to the flat tensors of one forward pass.

A group (one prompt, its K completions) is laid out once: [prompt | y_1 | ... | y_K]. Position ids of every completion
restart after the prompt, a completion attends to the prompt and to itself only, and several groups share one row. The
prompt's last hidden row predicts the first token of every completion, so it appears K times in `logit_rows`.

Everything here is plain numpy and CPU torch, picklable, and runs in data workers.

Shapes: B rows of the batch, S packed tokens, N completion tokens (rows of the LM head), G groups, C completions, T
pairs, M segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from dpo.config import Layout
from dpo.errors import UserError
from dpo.segments import Segments, ranges


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with its completions and the preference pairs among them.

    prompt: token ids, at least one. completions: K lists of token ids, each with its end-of-sequence and none empty.
    pairs: (chosen, rejected), indices into `completions`. row: where the group came from, for error messages.
    rankings: orders of indices into `completions`, the best first, of one Plackett-Luce comparison: one, or the orders
    of tied completions, which are averaged. Where there are any, they are what is trained, and the pairs only measure.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int]]
    row: int | str = -1
    rankings: Sequence[Sequence[int]] = ()

    @property
    def num_comparisons(self) -> int:
        """What a step counts and weighs: pairs, or 1 for a ranking."""
        return 1 if self.rankings else len(self.pairs)


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """One forward pass: what the trunk reads, and which of its hidden rows predict which targets of which completion.

    input_ids, position_ids: [B, S] int64 (B = 1 unless padded). attention_mask: [B, S] int64, 1 at tokens (padded
    only). segments: what the attention needs (None when padded). logit_rows: [N] int64 into the flattened [B * S]
    hidden rows; row n predicts targets[n] (int64) of completion completion_ids[n] (int64, 0..C-1 group by group, each
    completion's tokens adjacent and in order). chosen, rejected: [T] int64 into the completions of this batch.
    pair_weights: [T] float64, or None for equal weights. rankings: [R, K] int64 into the completions, the best first,
    padded with -1, or None; ranking_weights: [R] float64, or None for equal weights. completion_lengths,
    group_of_completion: [C] int64. counted: [B * S] bool, every token of the groups once: no padding, and of a prompt
    that is repeated the first copy, or none where another batch holds that. rows: the row id of each group, length G.
    sequence_lengths: the shortest and the longest prompt + completion, in tokens.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    segments: Segments | None
    logit_rows: Tensor
    targets: Tensor
    completion_ids: Tensor
    chosen: Tensor
    rejected: Tensor
    completion_lengths: Tensor
    group_of_completion: Tensor
    counted: Tensor
    rows: tuple[int | str, ...]
    sequence_lengths: tuple[int, int]
    layout: Layout
    pair_weights: Tensor | None = None
    rankings: Tensor | None = None
    ranking_weights: Tensor | None = None

    @property
    def num_groups(self) -> int:
        return len(self.rows)

    @property
    def num_completions(self) -> int:
        return self.completion_lengths.shape[0]

    @property
    def num_pairs(self) -> int:
        return self.chosen.shape[0]

    @property
    def num_tokens(self) -> int:
        """Token positions that the trunk computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> PackedBatch:
        changed: dict[str, Any] = {
            name: function(value) for name, value in self.__dict__.items() if isinstance(value, Tensor)
        }
        if self.segments is not None:
            changed["segments"] = self.segments.map(function)
        return replace(self, **changed)


def pack(
    groups: Sequence[Group], *, layout: Layout = "shared", counted_prompts: Sequence[bool] | None = None
) -> PackedBatch:
    """Lay groups out as one batch.

    groups: at least one. layout: see `Layout`. counted_prompts: of each group, whether its prompt is `counted` in this
    batch; None for all. Returns a PackedBatch on the CPU. Raises UserError for a group that cannot be laid out: a
    prompt or a completion with no token, or a pair that names no completion.
    """
    if layout not in get_args(Layout):
        raise ValueError(f"layout: expected one of {get_args(Layout)}, found {layout!r}")
    if len(groups) == 0:
        raise ValueError("groups: expected at least one group, found none")
    for group in groups:
        _check_group(group)

    prompts = [np.asarray(group.prompt, dtype=np.int64) for group in groups]
    completions = [[np.asarray(y, dtype=np.int64) for y in group.completions] for group in groups]
    flat = [y for ys in completions for y in ys]
    completion_lengths = np.array([y.size for y in flat], dtype=np.int64)
    per_group = np.array([len(ys) for ys in completions], dtype=np.int64)
    first_completion = np.cumsum(per_group) - per_group

    pieces, starts, layout_segments = _lay_out(prompts, completions, layout)
    lengths = np.array([piece.size for piece in pieces], dtype=np.int64)
    offsets = np.cumsum(lengths) - lengths
    ids = np.concatenate(pieces)
    positions = ranges(starts, lengths)
    slots = np.arange(ids.size)
    attention_mask = None
    if layout == "padded":
        row_of_piece = np.arange(lengths.size) // 2
        widths = lengths[0::2] + lengths[1::2]
        width = int(widths.max())
        # a padded row begins at row * width; the prompt of a row is piece 2 * row, its completion is piece 2 * row + 1
        offsets = row_of_piece * width
        offsets[1::2] += lengths[0::2]
        slots = ranges(offsets, lengths)
        ids, positions, attention_mask = _pad(ids, slots, widths, width)

    is_completion = np.ones(lengths.size, dtype=bool)
    is_completion[_prompt_pieces(per_group, layout)] = False
    counts = is_completion.copy()
    first_prompt = np.arange(len(groups)) + first_completion if layout == "shared" else 2 * first_completion
    counts[first_prompt] = True if counted_prompts is None else counted_prompts
    counted = np.zeros(ids.size, dtype=bool)
    counted[slots] = np.repeat(counts, lengths)
    prompt_piece = np.maximum.accumulate(np.where(is_completion, 0, np.arange(lengths.size)))[is_completion]
    last_prompt_row = offsets[prompt_piece] + lengths[prompt_piece] - 1
    logit_rows = ranges(offsets[is_completion] - 1, completion_lengths)
    logit_rows[np.cumsum(completion_lengths) - completion_lengths] = last_prompt_row

    sequence_lengths = completion_lengths + np.repeat([prompt.size for prompt in prompts], per_group)
    pairs = [
        (first + w, first + lo) for group, first in zip(groups, first_completion, strict=True) for w, lo in group.pairs
    ]
    pair_array = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    shape = (1, -1) if attention_mask is None else attention_mask.shape
    return PackedBatch(
        input_ids=torch.from_numpy(ids).view(shape),
        position_ids=torch.from_numpy(positions).view(shape),
        attention_mask=None if attention_mask is None else torch.from_numpy(attention_mask),
        segments=None if layout_segments is None else Segments.build(*layout_segments),
        logit_rows=torch.from_numpy(logit_rows),
        targets=torch.from_numpy(np.concatenate(flat)),
        completion_ids=torch.from_numpy(np.repeat(np.arange(completion_lengths.size), completion_lengths)),
        chosen=torch.from_numpy(pair_array[:, 0].copy()),
        rejected=torch.from_numpy(pair_array[:, 1].copy()),
        completion_lengths=torch.from_numpy(completion_lengths),
        group_of_completion=torch.from_numpy(np.repeat(np.arange(len(groups)), per_group)),
        counted=torch.from_numpy(counted),
        rows=tuple(group.row for group in groups),
        sequence_lengths=(int(sequence_lengths.min()), int(sequence_lengths.max())),
        layout=layout,
        rankings=ranking_table(groups, first_completion.tolist()),
    )


def ranking_table(groups: Sequence[Group], first: Sequence[int]) -> Tensor | None:
    """[R, K] int64: the rankings of all groups, whose completions are numbered from `first` on, padded with -1; None
    where there is none."""
    numbered = zip(groups, first, strict=True)
    rankings = [[start + index for index in order] for group, start in numbered for order in group.rankings]
    if not rankings:
        return None
    table = torch.full((len(rankings), max(map(len, rankings))), -1, dtype=torch.int64)
    for row, order in zip(table, rankings, strict=True):
        row[: len(order)] = torch.tensor(order)
    return table


def _check_group(group: Group) -> None:
    where = f"row {group.row}"
    if len(group.prompt) == 0:
        raise UserError(
            f"{where}: prompt: expected at least one token, found none (no row predicts the first completion token)"
        )
    if len(group.completions) == 0:
        raise UserError(f"{where}: completions: expected at least one, found none")
    for index, completion in enumerate(group.completions):
        if len(completion) == 0:
            raise UserError(f"{where}: completion {index}: expected at least one token, found none")
    for chosen, rejected in group.pairs:
        if not (0 <= chosen < len(group.completions) and 0 <= rejected < len(group.completions)) or chosen == rejected:
            raise UserError(
                f"{where}: pairs: expected two different indices below {len(group.completions)}, "
                f"found ({chosen}, {rejected})"
            )
    for order in group.rankings:
        if len(order) < 2 or len(set(order)) < len(order) or not set(order) <= set(range(len(group.completions))):
            raise UserError(
                f"{where}: rankings: expected two or more different indices below {len(group.completions)}, "
                f"found {list(order)}"
            )


def _lay_out(
    prompts: list[np.ndarray], completions: list[list[np.ndarray]], layout: Layout
) -> tuple[list[np.ndarray], np.ndarray, tuple[list[int], ...] | None]:
    """Pieces in the order of the row, the position id each starts at, and (q_start, q_stop, prefix_start, prefix_stop)
    a segment."""
    pieces: list[np.ndarray] = []
    starts: list[int] = []
    q_start, q_stop, prefix_start, prefix_stop = [], [], [], []
    row = 0
    for prompt, ys in zip(prompts, completions, strict=True):
        group_start = row
        for index, y in enumerate(ys):
            segment_start = row
            repeat_prompt = index == 0 or layout != "shared"
            if repeat_prompt:
                pieces.append(prompt)
                starts.append(0)
                row += prompt.size
            pieces.append(y)
            starts.append(prompt.size)
            row += y.size
            q_start.append(segment_start)
            q_stop.append(row)
            prefix_start.append(segment_start if repeat_prompt else group_start)
            prefix_stop.append(segment_start if repeat_prompt else group_start + prompt.size)
    segments = None if layout == "padded" else (q_start, q_stop, prefix_start, prefix_stop)
    return pieces, np.array(starts, dtype=np.int64), segments


def _prompt_pieces(per_group: np.ndarray, layout: Layout) -> np.ndarray:
    """Indices of the pieces that are prompts."""
    if layout == "shared":
        return np.cumsum(per_group + 1) - (per_group + 1)
    return np.arange(0, 2 * per_group.sum(), 2)


def _pad(
    ids: np.ndarray, slots: np.ndarray, widths: np.ndarray, width: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # padding sits to the right of every token and is masked, so its id does not matter: 0 exists in every vocabulary
    padded = np.zeros(widths.size * width, dtype=np.int64)
    padded[slots] = ids
    columns = np.arange(width, dtype=np.int64)
    attention_mask = (columns[None, :] < widths[:, None]).astype(np.int64)
    positions = np.broadcast_to(columns, attention_mask.shape).copy()
    return padded, positions, attention_mask


@dataclass(frozen=True, slots=True)
class BinPlan:
    """Which groups share a forward pass. bins: indices of groups; fill: tokens over (bins * budget), 1.0 being no room
    left."""

    bins: list[list[int]]
    fill: float


@dataclass(frozen=True, slots=True)
class GroupPart:
    """A part of a group that is larger than the budget. group: the prompt with some of the completions and no pairs
    (the caller, who has log-probs of every part, handles them); completions: which of the whole group's completions
    these are."""

    group: Group
    completions: tuple[int, ...]


def group_cost(group: Group, layout: Layout = "shared") -> int:
    """Token positions that the group occupies alone in a batch (a padded one counts its padding)."""
    lengths = [len(y) for y in group.completions]
    return _cost(len(group.prompt), lengths, layout)


def plan_bins(costs: Sequence[int], budget: int, *, rows: Sequence[int] | None = None) -> list[list[int]]:
    """First-fit decreasing bin packing, deterministic.

    costs: tokens of each item, at most `budget` each. rows: of padded items, how many rows each has: items of one bin
    are then padded to the widest of them, so a bin costs (sum of rows) * (largest cost / rows). Returns lists of
    indices, ascending within a bin, largest items' bins first. Raises ValueError for an item over the budget (see
    `split_group`).
    """
    cost = np.asarray(costs, dtype=np.int64)
    if cost.size and (cost.max() > budget or cost.min() <= 0):
        worst = int(cost.argmax() if cost.max() > budget else cost.argmin())
        raise ValueError(
            f"costs: expected 1 to {budget} (the budget) tokens, found {int(cost[worst])} at index {worst}"
        )
    if rows is None:
        height, width = cost, np.ones_like(cost)
    else:
        height = np.asarray(rows, dtype=np.int64)
        width = cost // height
    # a bin is as wide as its first item: items come widest first, so capacity in rows is known when a bin opens
    order = np.lexsort((np.arange(cost.size), -height, -width))
    room = np.zeros(cost.size, dtype=np.int64)
    bins: list[list[int]] = []
    for item in order.tolist():
        fits = room[: len(bins)] >= height[item]
        found = int(fits.argmax()) if fits.size else 0
        if not fits.size or not fits[found]:
            found = len(bins)
            bins.append([])
            room[found] = budget // width[item]
        room[found] -= height[item]
        bins[found].append(item)
    return [sorted(members) for members in bins]


def plan_groups(groups: Sequence[Group], budget: int, layout: Layout = "shared") -> BinPlan:
    """Bins of at most `budget` token positions for `groups`, none of which may be larger than the budget alone (see
    `split_group`)."""
    costs = [group_cost(group, layout) for group in groups]
    rows = [len(group.completions) for group in groups] if layout == "padded" else None
    bins = plan_bins(costs, budget, rows=rows)
    tokens = sum(
        sum(len(y) for y in g.completions) + len(g.prompt) * (1 if layout == "shared" else len(g.completions))
        for g in groups
    )
    return BinPlan(bins, tokens / (len(bins) * budget) if bins else 0.0)


def split_group(group: Group, budget: int, layout: Layout = "shared") -> list[GroupPart]:
    """Cut a group into parts of at most `budget` tokens, the prompt repeated in each; one part when it fits.

    Raises UserError when the prompt with a single completion is over the budget.
    """
    prompt, lengths = len(group.prompt), [len(y) for y in group.completions]
    longest = prompt + max(lengths)
    if longest > budget:
        raise UserError(
            f"row {group.row}: the prompt with one completion has {longest} tokens, more than --token-budget {budget}: "
            "raise it, or lower --max-prompt-length or --max-completion-length"
        )
    if group_cost(group, layout) <= budget:
        return [GroupPart(replace(group, pairs=(), rankings=()), tuple(range(len(lengths))))]
    if layout == "shared":
        bins = plan_bins(lengths, budget - prompt)
    elif layout == "packed":
        bins = plan_bins([prompt + length for length in lengths], budget)
    else:
        bins = plan_bins([prompt + length for length in lengths], budget, rows=[1] * len(lengths))
    return [
        GroupPart(
            replace(group, completions=[group.completions[i] for i in members], pairs=(), rankings=()), tuple(members)
        )
        for members in bins
    ]


def _cost(prompt: int, lengths: list[int], layout: Layout) -> int:
    if layout == "shared":
        return prompt + sum(lengths)
    if layout == "packed":
        return len(lengths) * prompt + sum(lengths)
    return len(lengths) * (prompt + max(lengths, default=0))
