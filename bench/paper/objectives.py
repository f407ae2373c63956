"""Forward and backward of a step: the trainer's own, and the losses that its registry does not have yet.

T pairs, C completions of a bin. Every loss is one of log ratios d (policy less reference) and log-probs lp, summed over
a completion's tokens, n of them.
"""

from __future__ import annotations

from itertools import groupby, permutations, product
from typing import Any

import torch
from dpo_kernels import LOSSES, ranking_loss
from torch import Tensor

from bench.paper.settings import Run
from dpo.engine import forward_backward
from dpo.loss import Objective, RefLogps, segment_sum, token_logps
from dpo.packing import Group
from dpo.steps import Bin, StepBatch


def step_backward(policy: Any, step: StepBatch, ref_logps: RefLogps, run: Run, groups: list[Group]) -> Tensor:
    """Accumulates the gradients of a step and returns its loss."""
    if run.loss in LOSSES and not run.rankings:
        objective = Objective(loss=run.loss, beta=run.beta, options=run.options)
        return forward_backward(policy, step, ref_logps, objective).sums.loss
    assert step.coupled is None
    total = torch.zeros((), dtype=torch.float64)
    for b in step.bins:
        batch = b.batch
        logps = token_logps(policy, batch, Objective())
        sums, ratios = (
            segment_sum(values, batch.completion_ids, batch.num_completions)
            for values in (logps, logps.double() - ref_logps(b).double())
        )
        if run.rankings:
            loss = _plackett_luce(ratios, b, run.beta, groups) / step.num_groups
        else:
            assert batch.pair_weights is not None
            losses = _pair_losses(run, ratios, sums, batch.completion_lengths, batch.chosen, batch.rejected)
            loss = (batch.pair_weights * losses).sum()
        loss.backward()
        total += loss.detach()
    return total


def _pair_losses(run: Run, ratios: Tensor, logps: Tensor, lengths: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[T] losses. ratios, logps, lengths: [C]."""
    if run.loss == "ipo":  # Azar et al. 2023, eq. 17: (d_w - d_l - 1 / (2 beta))^2
        return (ratios[chosen] - ratios[rejected] - 0.5 / run.beta).square()
    if run.loss == "sft":  # -lp_w / n_w
        return -(logps / lengths)[chosen]
    assert run.loss == "unlikelihood", run.loss  # -lp_w + alpha lp_l, the paper's section 6
    return run.options["unlikelihood_alpha"] * logps[rejected] - logps[chosen]


def orders(group: Group) -> list[list[int]]:
    """The group's completions from best to worst as its pairs order them: one order, or all those of tied ones."""
    wins = [sum(chosen == k for chosen, _ in group.pairs) for k in range(len(group.completions))]
    ranked = sorted(range(len(wins)), key=lambda k: -wins[k])
    levels = [list(permutations(level)) for _, level in groupby(ranked, key=lambda k: wins[k])]
    return [[k for level in choice for k in level] for choice in product(*levels)]


def _plackett_luce(ratios: Tensor, b: Bin, beta: float, groups: list[Group]) -> Tensor:
    """Sum over the bin's groups of the Plackett-Luce loss (A.3), the mean over the orders of tied completions."""
    rankings, weights, first = [], [], 0
    for index, completions in b.members:
        found = orders(groups[index])
        rankings += [[first + k for k in order] for order in found]
        weights += [1 / len(found)] * len(found)
        first += len(completions)
    reference = torch.zeros_like(ratios)
    losses = ranking_loss(ratios, reference, torch.tensor(rankings), beta=beta, reduction="none").loss
    return (torch.tensor(weights, dtype=torch.float64) * losses).sum()
