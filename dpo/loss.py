"""Forward, loss and backward of a step's bins: the path from a packed batch to gradients.

N completion rows, C completions, T pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from dpo_kernels import LinearPairLoss, PairCall, TokenStats, linear_dpo_loss, linear_token_logps, token_pair_loss
from torch import Tensor

from dpo.baseline import RunningBaseline
from dpo.model import head_of, trunk
from dpo.packing import PackedBatch
from dpo.steps import Bin, Coupled

RefLogps = Callable[[Bin], Tensor | None]
"""Gives the reference's per-token log-probs [N] of a bin, on the bin's device; None for losses without a reference."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, in which arithmetic, and how the LM head goes about it."""

    loss: str = "sigmoid"
    beta: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)
    """Of the loss, as `dpo_kernels` takes them."""
    baseline: RunningBaseline | None = None
    """Of bco_pair: the mean of all rewards so far."""
    autocast: torch.dtype | None = None
    head_plan: str = "auto"
    workspace_bytes: int | None = None
    backend: str | None = None

    @property
    def loss_options(self) -> dict[str, Any]:
        return {"loss": self.loss, "beta": self.beta, **self.options}

    @property
    def call(self) -> PairCall:
        """The loss with its options resolved."""
        return PairCall.check(self.loss, self.beta, "sum", **self.options)

    @property
    def head_options(self) -> dict[str, Any]:
        return {"plan": self.head_plan, "workspace_bytes": self.workspace_bytes, "backend": self.backend}

    @contextmanager
    def precision(self, device: torch.device) -> Iterator[None]:
        """Autocast for one forward, where asked for."""
        with torch.autocast(device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield


def token_logps(model: Any, batch: PackedBatch, objective: Objective) -> Tensor:
    """Log-probs [N] of a batch's targets, fp32 (float64 for a float64 model), differentiable."""
    return _token_stats(model, batch, objective, ()).logps


def _token_stats(model: Any, batch: PackedBatch, objective: Objective, stats: tuple[str, ...]) -> TokenStats:
    with objective.precision(batch.input_ids.device):
        hidden, head = trunk(model, batch), head_of(model)
        found = linear_token_logps(
            hidden,
            head.weight,
            batch.targets,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            stats=stats,
            **objective.head_options,
        )
    return found if isinstance(found, TokenStats) else TokenStats(found)


def bin_loss(model: Any, batch: PackedBatch, ref_logps: Tensor | None, objective: Objective) -> LinearPairLoss:
    """One-phase form: the weighted loss of a bin that holds all completions of its pairs.

    Args:
        ref_logps: [N] the reference's per-token log-probs; None for losses without a reference.
    Returns:
        loss (scalar), chosen and rejected rewards [T], token_logps [N].
    """
    with objective.precision(batch.input_ids.device):
        hidden, head = trunk(model, batch), head_of(model)
        return linear_dpo_loss(
            hidden,
            head.weight,
            batch.targets,
            batch.completion_ids,
            ref_logps,
            batch.chosen,
            batch.rejected,
            bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            num_completions=batch.num_completions,
            pair_weights=batch.pair_weights,
            reduction="sum",
            **objective.loss_options,
            **objective.head_options,
        )


@dataclass(frozen=True)
class CoupledLoss:
    """Result of the first phase: the loss, its rewards, and what the second phase needs."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: tuple[Tensor, ...]
    """Of each bin, [N]."""
    token_grads: tuple[Tensor, ...]
    """Of each bin, [N] float64: dL/dlp_t."""


def coupled_loss(
    model: Any, coupled: Coupled, ref_logps: RefLogps, objective: Objective, *, learn: bool = True
) -> CoupledLoss:
    """First phase: log-probs of all bins without gradient, then the loss and its gradient for every token.

    Args:
        learn: take the step's rewards into a running baseline.
    """
    call = objective.call
    held: list[TokenStats] = []
    references: list[Tensor | None] = []
    with torch.no_grad():
        for b in coupled.bins:
            held.append(_token_stats(model, b.batch, objective, ("log_sum_sq",) if call.wpo else ()))
            references.append(ref_logps(b))
    logps = torch.cat([stats.logps for stats in held]).double().requires_grad_()
    ids = torch.cat([b.completions[b.batch.completion_ids] for b in coupled.bins])
    ref = [part.double() for part in references if part is not None]
    arguments = logps, torch.cat(ref) if ref else None, ids, coupled.chosen, coupled.rejected
    settings: dict[str, Any] = {
        **objective.loss_options,
        "log_sum_sq": torch.cat([s.log_sum_sq for s in held if s.log_sum_sq is not None]) if call.wpo else None,
        "num_completions": coupled.num_completions,
        # a loss that sorts the step's pairs cannot weigh them: it has them all, each alike
        "reduction": "mean" if call.coupled == "batch" else "sum",
        "pair_weights": None if call.coupled == "batch" else coupled.pair_weights,
    }
    if objective.baseline is not None:
        if learn:
            with torch.no_grad():
                plain = token_pair_loss(*arguments, **settings)
            objective.baseline.update(torch.cat([plain.chosen_rewards, plain.rejected_rewards]))
        settings["bco_baseline"] = objective.baseline.mean
    with torch.enable_grad():
        out = token_pair_loss(*arguments, **settings)
        (grads,) = torch.autograd.grad(out.loss, logps)
    sizes = [stats.logps.numel() for stats in held]
    sides = out.chosen_rewards, out.rejected_rewards
    return CoupledLoss(out.loss.detach(), *sides, tuple(s.logps for s in held), grads.split(sizes))


def coupled_backward(model: Any, coupled: Coupled, token_grads: tuple[Tensor, ...], objective: Objective) -> None:
    """Second phase: forward and backward of every bin with dL/dlp_t fixed."""
    for b, g in zip(coupled.bins, token_grads, strict=True):
        logps = token_logps(model, b.batch, objective)
        logps.backward(g.to(logps.dtype))
