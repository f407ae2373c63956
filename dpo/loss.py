"""Forward, loss and backward of a step's bins: the path from a packed batch to gradients.

N completion rows, C completions, T pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from dpo_kernels import LinearPairLoss, linear_dpo_loss, linear_token_logps, pair_loss, ranking_loss
from dpo_kernels.backends import resolve_backend
from torch import Tensor

from dpo.model import head_of, trunk
from dpo.packing import PackedBatch
from dpo.steps import Bin, Coupled

RefLogps = Callable[[Bin], Tensor]
"""Gives the reference's per-token log-probs [N] of a bin, on the bin's device."""


@dataclass(frozen=True)
class Objective:
    """What is minimised, in which arithmetic, and how the LM head goes about it."""

    loss: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    top_k: int | None = None
    """Of rankings, only the first places are choices. None: all."""
    autocast: torch.dtype | None = None
    head_plan: str = "auto"
    workspace_bytes: int | None = None
    backend: str | None = None

    @property
    def loss_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"loss": self.loss, "beta": self.beta}
        if self.label_smoothing:
            options["label_smoothing"] = self.label_smoothing
        return options

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
    with objective.precision(batch.input_ids.device):
        hidden, head = trunk(model, batch), head_of(model)
        return linear_token_logps(hidden, head.weight, batch.targets, **head.arguments, **objective.head_options)


def bin_loss(model: Any, batch: PackedBatch, ref_logps: Tensor, objective: Objective) -> LinearPairLoss:
    """One-phase form: the weighted loss of a bin that holds all completions of its pairs.

    Args:
        ref_logps: [N] the reference's per-token log-probs.
    Returns:
        loss (scalar), chosen and rejected rewards [T], token_logps [N].
    """
    if batch.rankings is not None:
        return _ranked_bin_loss(model, batch, ref_logps, objective)
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
            **head.arguments,
            num_completions=batch.num_completions,
            pair_weights=batch.pair_weights,
            reduction="sum",
            **objective.loss_options,
            **objective.head_options,
        )


def _ranked_bin_loss(model: Any, batch: PackedBatch, ref_logps: Tensor, objective: Objective) -> LinearPairLoss:
    """`bin_loss` of rankings; the rewards are those of the pairs that the rankings decide."""
    logps = token_logps(model, batch, objective)
    difference = logps.double() - ref_logps.double()
    delta = segment_sum(difference, batch.completion_ids, batch.num_completions)
    assert batch.rankings is not None
    loss = plackett_luce(delta, batch.rankings, batch.ranking_weights, logps.dtype, objective)
    rewards = objective.beta * delta.detach()
    return LinearPairLoss(loss, rewards[batch.chosen], rewards[batch.rejected], logps.detach())


def plackett_luce(
    delta: Tensor, rankings: Tensor, weights: Tensor | None, dtype: torch.dtype, objective: Objective
) -> Tensor:
    """Weighted sum of the Plackett-Luce losses of rankings (Rafailov et al. 2023, A.3), differentiable.

    Args:
        delta: [C] float64 log ratios of completions. rankings: [R, K] int64, the best first, padded with -1.
        weights: [R], None for the mean.
        dtype: of the log-probs: what the Triton kernel reads, which has no float64.
    """
    triton = resolve_backend(objective.backend, delta.device, dtype) == "triton"
    values = delta.to(dtype) if triton else delta
    losses = ranking_loss(
        values,
        torch.zeros_like(values),
        rankings,
        beta=objective.beta,
        reduction="none",
        top_k=objective.top_k,
        backend="triton" if triton else "torch",
    ).loss.double()
    return losses.mean() if weights is None else (losses * weights).sum()


def segment_sum(values: Tensor, ids: Tensor, size: int) -> Tensor:
    """Sums `values` [N] by `ids` [N] into [size], in float64."""
    return torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, ids, values.double())


@dataclass(frozen=True)
class CoupledLoss:
    """Result of the first phase: the loss, its rewards, and what the second phase needs."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: tuple[Tensor, ...]
    completion_grads: Tensor
    """[C] float64: dL/dlp of each completion."""
    generators: tuple[Tensor, ...]
    """The random generator's state before each bin: the second phase draws the same dropout."""


def coupled_loss(model: Any, coupled: Coupled, ref_logps: RefLogps, objective: Objective) -> CoupledLoss:
    """First phase: log-probs of all bins without gradient, then the loss and its gradient for every completion."""
    held: list[Tensor] = []
    generators: list[Tensor] = []
    delta = torch.zeros(coupled.num_completions, dtype=torch.float64, device=coupled.chosen.device)
    with torch.no_grad():
        for b in coupled.bins:
            generators.append(_generator(b.batch.input_ids.device))
            held.append(token_logps(model, b.batch, objective))
            difference = held[-1].double() - ref_logps(b).double()
            delta[b.completions] = segment_sum(difference, b.batch.completion_ids, b.batch.num_completions)
    delta.requires_grad_()
    if coupled.rankings is not None:
        with torch.enable_grad():
            loss = plackett_luce(delta, coupled.rankings, coupled.ranking_weights, held[0].dtype, objective)
            (grads,) = torch.autograd.grad(loss, delta)
        rewards = objective.beta * delta.detach()
        sides = rewards[coupled.chosen], rewards[coupled.rejected]
        return CoupledLoss(loss.detach(), *sides, tuple(held), grads)
    with torch.enable_grad():
        out = pair_loss(
            delta,
            torch.zeros_like(delta),
            coupled.chosen,
            coupled.rejected,
            pair_weights=coupled.pair_weights,
            reduction="sum",
            backend=objective.backend,
            **objective.loss_options,
        )
        (grads,) = torch.autograd.grad(out.loss, delta)
    return CoupledLoss(
        out.loss.detach(), out.chosen_rewards, out.rejected_rewards, tuple(held), grads, tuple(generators)
    )


def coupled_backward(model: Any, coupled: Coupled, first: CoupledLoss, objective: Objective) -> None:
    """Second phase: forward and backward of every bin with dL/dlp fixed, and with the dropout of the first phase."""
    for b, state in zip(coupled.bins, first.generators, strict=True):
        device = b.batch.input_ids.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
            logps = token_logps(model, b.batch, objective)
        g = first.completion_grads[b.completions][b.batch.completion_ids]
        logps.backward(g.to(logps.dtype))


def _generator(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
