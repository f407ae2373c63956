"""What a group costs, and bins of even cost for several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo.packing import Group, Layout, plan_bins


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of a forward, up to a common factor: what a token, an attended pair of tokens and a row of the LM
    head cost."""

    token: float = 1.0
    attended: float = 0.0
    target: float = 0.0

    def of(self, group: Group, layout: Layout = "shared") -> float:
        """The cost of one group in a packed row (or of its padded rows)."""
        prompt = len(group.prompt)
        lengths = np.array([len(y) for y in group.completions], dtype=np.float64)
        if layout == "padded":
            lengths = np.full_like(lengths, lengths.max(initial=0))
        prompts = 1 if layout == "shared" else len(lengths)
        tokens = prompts * prompt + lengths.sum()
        attended = prompts * prompt * (prompt + 1) / 2 + (lengths * prompt + lengths * (lengths + 1) / 2).sum()
        targets = sum(len(y) for y in group.completions)
        return self.token * tokens + self.attended * attended + self.target * targets


def cost_of(model: Any) -> Cost:
    """The cost of a model's forward from its shapes; a layer of experts counts those that a token reaches."""
    config = model.config.get_text_config(decoder=True)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0
    reached = (getattr(config, "num_experts_per_tok", None) or 1) / experts if experts else 1.0
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    trunk = 0.0
    for name, weight in model.named_parameters():
        if weight is not head and weight is not embedding and weight.dim() > 1:
            trunk += weight.numel() * (reached if ".experts." in name else 1.0)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0))
    return Cost(token=trunk, attended=2.0 * width * config.num_hidden_layers, target=float(head.numel()))


def balanced_bins(
    sizes: Sequence[int],
    costs: Sequence[float],
    budget: int,
    ranks: int,
    *,
    rows: Sequence[int] | None = None,
) -> list[list[list[int]]]:
    """Bins of even cost, the same number for each rank, deterministic.

    As many bins as first-fit decreasing needs, rounded up to a multiple of `ranks` (a round more where that is much
    more even); heaviest items first, each into the lightest bin that has room. Bins of like cost are dealt to the ranks
    in the same round, so that ranks that wait for one another at every block (FSDP) wait little.

    Args:
        sizes: tokens of each item, at most `budget` each (of padded items: rows times width, see `plan_bins`).
        costs: cost of each item.
        rows: of padded items, how many rows each has.
    Returns:
        for each rank its bins, in the order of rounds: lists of indices, empty where there are fewer items than bins.
    """
    first_fit = plan_bins(sizes, budget, rows=rows)
    count = -(-len(first_fit) // ranks) * ranks
    even = _lightest_with_room(sizes, costs, budget, count, rows)
    if even is not None:
        return _deal(even, costs, ranks)
    dealt = _deal(first_fit + [[] for _ in range(count - len(first_fit))], costs, ranks)
    more = _lightest_with_room(sizes, costs, budget, count + ranks, rows)
    if more is not None and _seconds(_deal(more, costs, ranks), costs) < _WORTH_A_ROUND * _seconds(dealt, costs):
        return _deal(more, costs, ranks)
    return dealt


_WORTH_A_ROUND = 0.9


def _deal(bins: list[list[int]], costs: Sequence[float], ranks: int) -> list[list[list[int]]]:
    ordered = sorted(bins, key=lambda members: -sum(costs[m] for m in members))
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    for turn in range(0, len(bins), ranks):
        hand = ordered[turn : turn + ranks]
        for who, members in enumerate(hand if turn // ranks % 2 == 0 else reversed(hand)):
            dealt[who].append(sorted(members))
    return dealt


def _lightest_with_room(
    sizes: Sequence[int], costs: Sequence[float], budget: int, count: int, rows: Sequence[int] | None
) -> list[list[int]] | None:
    height = np.asarray(sizes if rows is None else rows, dtype=np.int64)
    width = np.ones_like(height) if rows is None else np.asarray(sizes, dtype=np.int64) // height
    bins: list[list[int]] = [[] for _ in range(count)]
    load, tall, wide = np.zeros(count), np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for item in sorted(range(len(sizes)), key=lambda k: (-costs[k], k)):
        room = (tall + height[item]) * np.maximum(wide, width[item]) <= budget
        if not room.any():
            return None
        best = int(np.where(room, load, np.inf).argmin())
        bins[best].append(item)
        load[best] += costs[item]
        tall[best] += height[item]
        wide[best] = max(wide[best], width[item])
    return bins


def imbalance(dealt: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> float:
    """Time that ranks wait, over the time that they compute: 0 where every round is even."""
    total = sum(costs[m] for bins in dealt for members in bins for m in members)
    return _seconds(dealt, costs) * len(dealt) / total - 1 if total else 0.0


def _seconds(dealt: Sequence[Sequence[Sequence[int]]], costs: Sequence[float]) -> float:
    """Rounds one after another, each as long as its heaviest bin."""
    return sum(max(sum(costs[m] for m in members) for members in hand) for hand in zip(*dealt, strict=True))
