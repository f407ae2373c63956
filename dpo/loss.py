"""Forward, loss and backward of a step's bins: the path from a packed batch to gradients.

N completion rows, C completions, T pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from dpo_kernels import (
    LinearPairLoss,
    PairCall,
    TokenStats,
    linear_dpo_loss,
    linear_token_logps,
    ranking_loss,
    token_pair_loss,
)
from dpo_kernels.backends import resolve_backend
from torch import Tensor

from dpo.baseline import RunningBaseline
from dpo.distributed import gathered_rows, rank
from dpo.model import head_of, trunk, trunk_and_routers
from dpo.packing import PackedBatch
from dpo.parallel import inside, last_of_step
from dpo.router import Balance, Routed, balance, experts_of, routed
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
    top_k: int | None = None
    """Of rankings, only the first places are choices. None: all."""
    router_aux_loss: float = 0.0
    """Weight of the load-balancing loss of a mixture of experts, in training (`dpo.router`)."""
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
    return _forward(model, batch, objective)[0].logps


def _forward(
    model: Any, batch: PackedBatch, objective: Objective, *, stats: tuple[str, ...] = (), routers: bool = False
) -> tuple[TokenStats, Routed | None]:
    """Log-probs of a batch, and with `routers` what the routers did."""

    def run() -> tuple[TokenStats, tuple[Tensor, Tensor, Tensor] | None]:
        hidden, logits = trunk_and_routers(model, batch) if routers else (trunk(model, batch), ())
        head = head_of(model)
        found = linear_token_logps(
            hidden, head.weight, batch.targets, **head.arguments, stats=stats, **objective.head_options
        )
        sums = routed(logits, batch.counted, experts_of(model)) if routers else None
        held = None if sums is None else (sums.probabilities, sums.choices, sums.tokens)
        return found if isinstance(found, TokenStats) else TokenStats(found), held

    with objective.precision(batch.input_ids.device):
        found, held = inside(model, run)
    return found, None if held is None else Routed(*held)


def bin_loss(model: Any, batch: PackedBatch, ref_logps: Tensor | None, objective: Objective) -> LinearPairLoss:
    """One-phase form: the weighted loss of a bin that holds all completions of its pairs.

    Args:
        ref_logps: [N] the reference's per-token log-probs; None for losses without a reference.
    Returns:
        loss (scalar), chosen and rejected rewards [T], token_logps [N].
    """
    if batch.rankings is not None:
        assert ref_logps is not None
        return _ranked_bin_loss(model, batch, ref_logps, objective)

    def run() -> LinearPairLoss:
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

    with objective.precision(batch.input_ids.device):
        return inside(model, run)


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
    """Of each bin, [N]."""
    token_grads: tuple[Tensor, ...]
    """Of each bin, [N] float64: dL/dlp_t."""
    generators: tuple[Tensor, ...]
    """The random generator's state before each bin: the second phase draws the same dropout."""
    routers: Balance | None = None
    """Where the objective balances experts."""


def coupled_loss(
    model: Any, coupled: Coupled, ref_logps: RefLogps, objective: Objective, *, learn: bool = True
) -> CoupledLoss:
    """First phase: log-probs of all bins without gradient, then the loss and its gradient for every token.

    Args:
        learn: the step trains: its rewards go into a running baseline, and experts are balanced.
    """
    routers = learn and objective.router_aux_loss > 0
    stats = ("log_sum_sq",) if objective.call.wpo else ()
    routes: list[Routed] = []
    held: list[TokenStats] = []
    references: list[Tensor | None] = []
    generators: list[Tensor] = []
    with torch.no_grad():
        for b in coupled.bins:
            generators.append(_generator(b.batch.input_ids.device))
            found, route = _forward(model, b.batch, objective, stats=stats, routers=routers)
            held.append(found)
            routes += [] if route is None else [route]
            references.append(ref_logps(b))
    parts = gathered_rows(torch.cat([stats.logps for stats in held]))
    logps = torch.cat(parts).double().requires_grad_()
    ref = _of_all_ranks([part.double() for part in references if part is not None])
    ids = _of_all_ranks([b.completions[b.batch.completion_ids] for b in coupled.bins])
    squares = _of_all_ranks([stats.log_sum_sq for stats in held if stats.log_sum_sq is not None])
    assert ids is not None
    phase = _rankings_of_step if coupled.rankings is not None else _pairs_of_step
    step = StepRows(ref, ids, squares, held[0].logps.dtype)
    loss, chosen, rejected = phase(logps, step, coupled, objective, learn)
    (grads,) = torch.autograd.grad(loss, logps)
    mine = grads.split([part.numel() for part in parts])[rank()].split([stats.logps.numel() for stats in held])
    held_logps = tuple(stats.logps for stats in held)
    balanced = balance(routes) if routes else None
    return CoupledLoss(loss.detach(), chosen, rejected, held_logps, mine, tuple(generators), balanced)


@dataclass(frozen=True)
class StepRows:
    """What a step's loss takes of every completion row of all bins and ranks, [N] each, beside its log-probs."""

    ref: Tensor | None
    ids: Tensor
    log_sum_sq: Tensor | None
    dtype: torch.dtype
    """Of the log-probs as they were computed."""


def _of_all_ranks(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(gathered_rows(torch.cat(parts))) if parts else None


@torch.enable_grad()
def _rankings_of_step(
    logps: Tensor, step: StepRows, coupled: Coupled, objective: Objective, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a step's rankings, with the rewards of the pairs that they decide."""
    assert step.ref is not None
    assert coupled.rankings is not None
    delta = segment_sum(logps - step.ref, step.ids, coupled.num_completions)
    loss = plackett_luce(delta, coupled.rankings, coupled.ranking_weights, step.dtype, objective)
    rewards = objective.beta * delta.detach()
    return loss, rewards[coupled.chosen], rewards[coupled.rejected]


@torch.enable_grad()
def _pairs_of_step(
    logps: Tensor, step: StepRows, coupled: Coupled, objective: Objective, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a step's pairs, with their rewards; a running baseline learns from them first."""
    call = objective.call
    arguments = logps, step.ref, step.ids, coupled.chosen, coupled.rejected
    settings: dict[str, Any] = {
        **objective.loss_options,
        "log_sum_sq": step.log_sum_sq,
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
    out = token_pair_loss(*arguments, **settings)
    return out.loss, out.chosen_rewards, out.rejected_rewards


def coupled_backward(
    model: Any, coupled: Coupled, first: CoupledLoss, objective: Objective, loss_scale: Tensor | float = 1.0
) -> None:
    """Second phase, a step's last: forward and backward of every bin with dL/dlp_t fixed and the first phase's dropout.

    Args:
        loss_scale: what gradients are multiplied by, for fp16.
    """
    for b, g, state in zip(coupled.bins, first.token_grads, first.generators, strict=True):
        device = b.batch.input_ids.device
        last_of_step(model, b is coupled.bins[-1])
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
            found, route = _forward(model, b.batch, objective, routers=first.routers is not None)
        outputs, grads = [found.logps], [(g * loss_scale).to(found.logps.dtype)]
        if route is not None and first.routers is not None:
            outputs.append(route.probabilities)
            grads.append(objective.router_aux_loss * first.routers.gradient * loss_scale)
        torch.autograd.backward(outputs, grads)


def _generator(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
