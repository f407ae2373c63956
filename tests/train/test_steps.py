"""Drawing, normalising and packing a step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dpo.steps import StepBatch, StepDataset, StepPlan, build_step, draw_epoch, eval_steps, pair_weights
from tests.train.toy import random_groups


def test_an_epoch_draws_every_group_once_and_depends_on_the_seed_alone():
    pairs = [1, 3, 2, 6, 1, 1, 4, 2, 1]
    plan = StepPlan(pairs_per_step=6)
    steps = draw_epoch(pairs, plan, 0)
    assert sorted(group for step in steps for group in step) == list(range(9))
    assert all(sum(pairs[g] for g in step) <= 6 for step in steps)
    assert draw_epoch(pairs, replace(plan, token_budget=1, layout="packed"), 0) == steps
    assert draw_epoch(pairs, plan, 1) != steps
    assert draw_epoch(pairs, replace(plan, seed=1), 0) != steps


def test_a_group_with_more_pairs_than_a_step_is_a_step_of_its_own():
    steps = draw_epoch([2, 9, 2], StepPlan(pairs_per_step=4), 0)
    assert [1] in steps
    assert len(steps) <= 3


def test_groups_per_step_cuts_by_prompts():
    steps = draw_epoch([5] * 7, StepPlan(groups_per_step=3), 0)
    assert [len(step) for step in steps] == [3, 3, 1]


def test_weights_of_a_step_sum_to_one_however_it_is_packed():
    groups = random_groups()
    for reduction in ("pairs", "prompts"):
        for budget in (50, 10_000):
            plan = StepPlan(reduction=reduction, token_budget=budget)
            step = build_step(groups, range(len(groups)), plan)
            weights = [b.batch.pair_weights.sum().item() for b in step.bins if b.batch.pair_weights is not None]
            if step.coupled is not None:
                weights.append(step.coupled.pair_weights.sum().item())
            assert sum(weights) == pytest.approx(1.0, abs=1e-12)
            assert step.num_pairs == sum(len(group.pairs) for group in groups)


def test_prompts_weigh_alike_under_reduction_prompts():
    assert pair_weights([1, 4], "prompts") == [0.5, 0.125]
    assert pair_weights([1, 4], "pairs") == [0.2, 0.2]


def test_every_completion_is_in_exactly_one_bin_and_groups_over_the_budget_are_coupled():
    groups = random_groups(completions=(4, 4))
    step = build_step(groups, range(len(groups)), StepPlan(token_budget=40))
    members = [(g, c) for b in step.all_bins for g, completions in b.members for c in completions]
    assert sorted(members) == [(g, c) for g, group in enumerate(groups) for c in range(len(group.completions))]
    assert step.coupled is not None
    assert all(b.batch.num_tokens <= 40 for b in step.all_bins)
    numbers = sorted(int(c) for b in step.coupled.bins for c in b.completions)
    assert numbers == list(range(step.coupled.num_completions))


def test_two_phase_couples_everything():
    groups = random_groups()
    step = build_step(groups, [3, 1], StepPlan(two_phase=True))
    assert step.bins == ()
    assert step.coupled is not None
    assert len(step.coupled.chosen) == len(groups[3].pairs) + len(groups[1].pairs)


def test_max_steps_repeats_the_data_and_epochs_bound_it():
    groups = random_groups(count=4)
    plan = StepPlan(groups_per_step=2)
    assert len(StepDataset(groups, plan)) == 2
    assert [epoch for epoch, _ in StepDataset(groups, plan, max_steps=5).steps] == [0, 0, 1, 1, 2]
    assert len(StepDataset(groups, plan, max_steps=5, epochs=1)) == 2


def test_first_uses_visit_every_group_once():
    groups = random_groups(count=6)
    steps = StepDataset(groups, StepPlan(groups_per_step=2), max_steps=9)
    assert steps.first_uses() == [0, 1, 2]
    used = {group for index in steps.first_uses(4) for group in steps.steps[index][1]}
    assert used == {group for _, step in steps.steps[4:] for group in step}


@pytest.mark.parametrize("reduction", ["pairs", "prompts"])
def test_evaluation_in_chunks_weighs_like_one_step(reduction):
    groups = random_groups()
    plan = StepPlan(reduction=reduction)
    whole = eval_steps(groups, plan)
    chunks = eval_steps(groups, plan, groups_per_chunk=2)
    assert [step.share for step in whole] == [1.0]

    def weights(steps: list[StepBatch]) -> list[float]:
        held = [(step.share, b.batch.pair_weights) for step in steps for b in step.bins]
        return sorted(w * share for share, tensor in held if tensor is not None for w in tensor.tolist())

    assert weights(chunks) == pytest.approx(weights(whole), abs=1e-15)
