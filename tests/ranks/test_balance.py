"""Bins of several ranks: every group once, within the budget, as many on each rank, and of even cost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from dpo.balance import Cost, balanced_bins, cost_of, imbalance
from dpo.packing import Group, group_cost, plan_bins
from dpo.steps import StepPlan, build_step
from tests.train.toy import random_groups, toy_config


def _log_normal(seed: int, count: int) -> list[int]:
    draw = np.random.default_rng(seed)
    return np.clip(draw.lognormal(5.5, 0.7, count), 10, 2000).astype(int).tolist()


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("seed", range(4))
def test_every_item_is_in_one_bin_within_the_budget(ranks, seed):
    sizes = _log_normal(seed, 40)
    rows = np.random.default_rng(seed).integers(1, 4, 40).tolist()
    for tokens, heights in ((sizes, None), ([s * r for s, r in zip(sizes, rows, strict=True)], rows)):
        dealt = balanced_bins(tokens, [float(t) for t in tokens], 6000, ranks, rows=heights)
        assert len(dealt) == ranks
        assert len({len(bins) for bins in dealt}) == 1
        assert sorted(m for bins in dealt for members in bins for m in members) == list(range(40))
        for members in (members for bins in dealt for members in bins if members):
            if heights is None:
                assert sum(tokens[m] for m in members) <= 6000
            else:
                assert sum(rows[m] for m in members) * max(sizes[m] for m in members) <= 6000


def test_an_item_that_fits_one_bin_only_sends_them_all_to_first_fit():
    # the lightest bin of the first three has no room for the last: 6 + 6 | 4 + 4 + 4 fits, 6 + 4 | 6 + 4 | + 4 does not
    dealt = balanced_bins([6, 6, 4, 4, 4], [6, 6, 4, 4, 4], 12, 2)
    assert dealt == [[[0, 1]], [[2, 3, 4]]]


@pytest.mark.parametrize("ranks", [4, 8])
def test_ranks_wait_less_than_with_bins_by_first_fit(ranks):
    """First-fit leaves the last bins nearly empty, and fills the rest by tokens alone."""
    ours, first_fit = [], []
    for seed in range(10):
        sizes = _log_normal(seed, 64)
        costs = [s + s * s / 2000 for s in sizes]
        dealt = balanced_bins(sizes, costs, 4096, ranks)
        ours.append(imbalance(dealt, costs))
        bins = plan_bins(sizes, 4096)
        bins += [[] for _ in range(-len(bins) % ranks)]
        first_fit.append(imbalance([bins[k::ranks] for k in range(ranks)], costs))
    # where the budget leaves no choice (one draw of these) first-fit it is
    assert np.median(ours) < 0.02
    assert np.mean(first_fit) > 5 * np.mean(ours)


def test_cost_counts_the_products_of_a_forward():
    """Against torch's own count of floating point operations in a plain forward of one sequence."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    model = LlamaForCausalLM(toy_config(hidden_size=64, intermediate_size=160, attn_implementation="eager"))
    prompt, completion = 30, 50
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, prompt + completion, dtype=torch.int64), logits_to_keep=completion)
    ours = cost_of(model).of(Group([0] * prompt, [[0] * completion], ()))
    # the plain forward computes the whole square of attention, the packed one its lower half
    length = prompt + completion
    above = 2.0 * 64 * 2 * (length * length - length * (length + 1) / 2)
    assert 2 * (ours + above) == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
@pytest.mark.parametrize("budget", [10_000, 120, 45])
def test_the_ranks_of_a_step_hold_its_groups_between_them(layout, budget):
    groups = random_groups()
    if budget < max(group_cost(g, layout) for g in groups) and layout == "padded":
        budget = 70
    plan = StepPlan(token_budget=budget, layout=layout, ranks=3, cost=Cost(1.0, 0.01, 2.0))
    steps = [build_step(groups, list(range(9)), replace(plan, rank=k)) for k in range(3)]
    alone = build_step(groups, list(range(9)), replace(plan, ranks=1))
    assert len({len(step.bins) for step in steps}) == 1
    assert len({len(step.coupled.bins) if step.coupled else 0 for step in steps}) == 1
    members = sorted(m for step in steps for b in step.all_bins for m in b.members)
    held = {(g, c) for g, completions in members for c in completions}
    assert held == {(g, c) for g in range(9) for c in range(len(groups[g].completions))}
    assert len(members) >= len({g for g, _ in members}) == 9
    held_weights = [b.batch.pair_weights for step in steps for b in step.bins]
    first, last = steps[0].coupled, steps[2].coupled
    if first is not None and last is not None:
        assert torch.equal(first.chosen, last.chosen)
        held_weights.append(first.pair_weights)
    weights = sum(float(w.sum()) for w in held_weights if w is not None)
    assert weights == pytest.approx(1.0)
    for name in ("num_pairs", "num_groups", "num_tokens"):
        values = {getattr(step, name) for step in steps}
        assert len(values) == 1
        if layout != "padded":  # whose padding depends on the bins
            assert values == {getattr(alone, name)}
    assert 0 < steps[0].fill <= 1
