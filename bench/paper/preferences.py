"""Preferences over samples of the reference, and policies trained on them by the trainer's own step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.paper.language import save_whole
from bench.paper.sampling import Reward, completions_of, rewards_of, sample
from bench.paper.settings import Run, Settings
from dpo.comparisons import rank
from dpo.console import Bar
from dpo.engine import forward_backward
from dpo.loss import Objective
from dpo.metrics import PairSums
from dpo.model import prepare
from dpo.optim import Schedule, apply_update, build_optimizer, set_lr
from dpo.packing import Group
from dpo.reference import CachedReference, no_reference
from dpo.steps import StepBatch, StepDataset, StepPlan


class Preferences(list[Group]):
    """Groups in memory with what a step asks of the data."""

    def num_pairs(self, index: int) -> int:
        return len(self[index].pairs)


def load_samples(
    path: Path, model: Any, tokenizer: Any, reward: Reward, prompts: Tensor, settings: Settings, seed: int
) -> tuple[Tensor, Tensor]:
    """Samples of the reference [prompts * K, L] and their rewards [prompts, K]; kept in `path`."""
    if not path.exists():
        rows = sample(model, prompts.repeat_interleave(settings.completions, 0), settings.max_new_tokens, seed)
        save_whole(path, {"rows": rows, "rewards": rewards_of(rows, tokenizer, reward)})
    held = torch.load(path, weights_only=True)
    return held["rows"], held["rewards"].view(-1, settings.completions)


def compare(rows: Tensor, rewards: Tensor, length: int, end: int) -> Preferences:
    """All pairs of a prompt's completions whose rewards differ, better first; prompts without any are left out."""
    completions, per_prompt = completions_of(rows, length, end), rewards.shape[1]
    groups = Preferences()
    for k, scores in enumerate(rewards.tolist()):
        indices = range(per_prompt)
        pairs = [(a, b) for a in indices for b in indices if scores[a] > scores[b]]
        if pairs:
            first = k * per_prompt
            prompt = rows[first, :length].tolist()
            groups.append(Group(prompt, completions[first : first + per_prompt], pairs, row=k))
    return groups


def with_rankings(groups: Preferences) -> Preferences:
    """The same groups, compared by the order of their completions: all orders of tied ones, which are averaged."""
    ranked = Preferences()
    for group in groups:
        wins = [sum(chosen == k for chosen, _ in group.pairs) for k in range(len(group.completions))]
        ranked.append(replace(group, rankings=rank(range(len(wins)), wins)))
    return ranked


class Trainer:
    """Trains copies of the reference on the same preferences, in the same steps."""

    def __init__(self, reference: Any, groups: Preferences, settings: Settings, seed: int) -> None:
        self.reference, self.settings = reference, settings
        prepare(reference, "shared")
        plan = StepPlan(groups_per_step=settings.prompts_per_step, seed=seed)
        self.steps = StepDataset(groups, plan)
        # the same completions in the same steps and bins, so the cached log-probs serve both
        self.ranked = StepDataset(with_rankings(groups), plan)
        self.logps = CachedReference()
        with Bar("reference", len(self.steps), log_every=1000) as bar:
            self.logps.fill(
                reference,
                (self.steps[i] for i in range(len(self.steps))),
                Objective(),
                torch.device("cpu"),
                lambda step: bar.advance(pairs=step.num_pairs, tokens=step.num_tokens),
            )

    def steps_of(self, run: Run) -> StepDataset:
        """The steps, with what the run compares in them."""
        return self.ranked if run.rankings else self.steps

    def backward(self, run: Run, policy: Any, step: StepBatch) -> PairSums:
        """Forward and backward of one step by the trainer; gradients accumulate in the policy."""
        objective = Objective(loss=run.loss, beta=run.beta, options=run.options)
        reference = self.logps if objective.call.reference else no_reference
        return forward_backward(policy, step, reference, objective).sums

    def policies(self, run: Run) -> Iterator[tuple[int, Any]]:
        """Steps done and the policy, wherever the run is to be measured."""
        settings, steps = self.settings, self.steps_of(run)
        total = len(steps)
        policy = copy.deepcopy(self.reference)
        prepare(policy, "shared")
        optimizer = build_optimizer(settings.optimizer, policy.parameters(), lr=1.0)
        schedule = Schedule("paper", run.lr_factor * settings.lr, settings.warmup_steps, total)
        stops = {max(1, round(fraction * total)) for fraction in run.measure_after}
        with Bar(run.name, total, log_every=1000) as bar:
            for index in range(total):
                policy.train()
                set_lr(optimizer, schedule(index))
                step = steps[index]
                sums = self.backward(run, policy, step)
                apply_update(optimizer, sums.loss, settings.grad_clip)
                bar.advance(pairs=step.num_pairs, tokens=step.num_tokens)
                if index + 1 in stops:
                    yield index + 1, policy
