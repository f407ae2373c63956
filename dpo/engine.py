"""Forward and backward of a step, and the same numbers without gradients for evaluation.

T pairs, C completions, N completion rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo.distributed import all_sum, is_main
from dpo.loss import CoupledLoss, Objective, RefLogps, bin_loss, coupled_backward, coupled_loss
from dpo.metrics import PairSums, completion_sums
from dpo.modes import in_evaluation
from dpo.parallel import gathered_once, last_of_step
from dpo.steps import Bin, StepBatch


@dataclass(frozen=True)
class StepResult:
    """A step's forward and backward, still on the device."""

    sums: PairSums
    logps: list[tuple[Bin, Tensor]]
    """Per-token log-probs of every bin: what to look at when something is not finite."""
    rewards: list[tuple[tuple[int, ...], Tensor, Tensor]] = field(default_factory=list)
    """Groups (indices in the data), and the rewards [T] of either side of their pairs, in their order."""
    routers: list[Tensor] = field(default_factory=list)
    """The load-balancing loss of the step, unweighted and no part of the loss in `sums`; empty where there is none."""


def forward_backward(
    model: Any, step: StepBatch, ref_logps: RefLogps, objective: Objective, loss_scale: Tensor | float = 1.0
) -> StepResult:
    """Forward and backward of all bins of a step; gradients accumulate in the parameters. Waits for nothing.

    Sums and gradients are those of all ranks.

    Args:
        loss_scale: what gradients are multiplied by, for fp16. The loss that is reported is not.
    Raises:
        ValueError: experts are to be balanced, and the step is not in the two-phase form.
    """
    if objective.router_aux_loss and step.bins:
        raise ValueError("router_aux_loss: expected a step in the two-phase form, found bins that stand alone")
    result = StepResult(PairSums(step.all_bins[0].batch.input_ids.device), [])
    with gathered_once(model):
        for b in step.bins:
            last_of_step(model, step.coupled is None and b is step.bins[-1])
            out = bin_loss(model, b.batch, ref_logps(b), objective)
            (out.loss * loss_scale).backward()
            _record(result, b, out.token_logps, out)
        if step.coupled is not None:
            out = coupled_loss(model, step.coupled, ref_logps, objective)
            coupled_backward(model, step.coupled, out, objective, loss_scale)
            _record_coupled(result, step, out)
            result.routers.extend([] if out.routers is None else [out.routers.loss])
    all_sum(result.sums.sums)
    return result


@torch.no_grad()
def forward_only(model: Any, step: StepBatch, ref_logps: RefLogps, objective: Objective) -> StepResult:
    """The same numbers without gradients; sums are those of this rank's bins."""
    result = StepResult(PairSums(step.all_bins[0].batch.input_ids.device), [])
    for b in step.bins:
        out = bin_loss(model, b.batch, ref_logps(b), objective)
        _record(result, b, out.token_logps, out, step.share)
    if step.coupled is not None:
        _record_coupled(result, step, coupled_loss(model, step.coupled, ref_logps, objective, learn=False))
    return result


def _record(result: StepResult, b: Bin, logps: Tensor, out: Any, share: float = 1.0) -> None:
    result.sums.add(
        loss=out.loss, chosen_rewards=out.chosen_rewards, rejected_rewards=out.rejected_rewards, share=share
    )
    lengths, margins = b.batch.completion_lengths, out.chosen_rewards - out.rejected_rewards
    result.sums.add_logps(completion_sums(logps, b.batch), lengths, b.batch.chosen, b.batch.rejected)
    result.sums.add_lengths(margins, lengths, b.batch.chosen, b.batch.rejected)
    result.logps.append((b, logps.detach()))
    result.rewards.append((tuple(group for group, _ in b.members), out.chosen_rewards, out.rejected_rewards))


def _record_coupled(result: StepResult, step: StepBatch, out: CoupledLoss) -> None:
    coupled = step.coupled
    assert coupled is not None
    device = coupled.chosen.device
    sums = torch.zeros(coupled.num_completions, dtype=torch.float64, device=device)
    lengths = torch.zeros(coupled.num_completions, dtype=torch.int64, device=device)
    for b, logps in zip(coupled.bins, out.token_logps, strict=True):
        sums[b.completions] = completion_sums(logps, b.batch)
        lengths[b.completions] = b.batch.completion_lengths.to(device)
        result.logps.append((b, logps))
    result.rewards.append((coupled.groups, out.chosen_rewards, out.rejected_rewards))
    all_sum(sums)
    all_sum(lengths)
    if is_main():  # every rank has the comparisons of all
        result.sums.add(
            loss=out.loss, chosen_rewards=out.chosen_rewards, rejected_rewards=out.rejected_rewards, share=step.share
        )
        result.sums.add_logps(sums, lengths, coupled.chosen, coupled.rejected)
        margins = out.chosen_rewards - out.rejected_rewards
        result.sums.add_lengths(margins, lengths, coupled.chosen, coupled.rejected)


def evaluate(
    model: Any,
    steps: Iterable[StepBatch],
    ref_logps: RefLogps,
    objective: Objective,
    device: torch.device,
    see: Callable[[StepBatch, StepResult], None] | None = None,
) -> dict[str, float]:
    """Loss, accuracy, margin, rewards and log-probs per token over held-out steps: means over all of their pairs.

    see: called with each step (on the device) and its result.
    """
    total = PairSums(device)
    with in_evaluation(model), gathered_once(model):
        for step in steps:
            moved = step.to(device)
            result = forward_only(model, moved, ref_logps, objective)
            total.sums += result.sums.sums
            if see is not None:
                see(moved, result)
    all_sum(total.sums)
    return total.read()
