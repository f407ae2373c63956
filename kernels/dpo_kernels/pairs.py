"""pair_loss: losses on (chosen, rejected) pairs of completions, with gradients worked by hand.

Shapes: C completions, T pairs. All arithmetic is float64.
Order: the table of losses, forward, autograd, public function.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators
from .backends import resolve_backend
from .common import accumulation_dtype, check_float, check_index, check_same_device, check_shape

REDUCTIONS = ("mean", "sum", "none")


class PairLoss(NamedTuple):
    """loss: scalar ([T] for reduction "none"); rewards [T] beta * (policy - reference), detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True, slots=True)
class LossEntry:
    """One loss of the table."""

    formula: Callable[[Tensor, Tensor, float, Mapping[str, float]], tuple[Tensor, Tensor, Tensor]]
    """(delta_w [T], delta_l [T], beta, options) -> (loss [T], dloss/ddelta_w [T], dloss/ddelta_l [T]), float64."""
    paper: str
    options: Mapping[str, float] = field(default_factory=dict)
    """Options that the loss uses, with the values that leave it plain."""


def _sigmoid(won: Tensor, lost: Tensor, beta: float, options: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """-(1-e) log sigmoid(m) - e log sigmoid(-m), m = beta (delta_w - delta_l); dL/dm = e - sigmoid(-m)."""
    epsilon = options["label_smoothing"]
    margin = beta * (won - lost)
    loss = -F.logsigmoid(margin)
    slope = -torch.sigmoid(-margin)
    if epsilon:
        # log sigmoid(-m) = log sigmoid(m) - m
        loss = loss + epsilon * margin
        slope = slope + epsilon
    return loss, beta * slope, -beta * slope


LOSSES: dict[str, LossEntry] = {
    "sigmoid": LossEntry(
        _sigmoid,
        "Rafailov et al. 2023 (arXiv:2305.18290), eq. 7; with label smoothing cDPO, Mitchell 2023",
        {"label_smoothing": 0.0},
    ),
}


@dataclass(frozen=True, slots=True)
class PairCall:
    """The non-tensor arguments of one call."""

    loss: str
    beta: float
    options: tuple[tuple[str, float], ...]
    reduction: str

    @classmethod
    def check(cls, loss: str, beta: float, reduction: str, **options: float) -> "PairCall":
        """Refuses an unknown loss and any option that the loss does not use."""
        if loss not in LOSSES:
            raise ValueError(f"loss: expected one of {', '.join(LOSSES)}, found {loss!r}")
        if not 0 < beta < math.inf:
            raise ValueError(f"beta: expected a number above 0, found {beta}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
        used = dict(LOSSES[loss].options)
        for name, value in options.items():
            if name in used:
                used[name] = value
            elif value != OPTION_DEFAULTS[name]:
                default = OPTION_DEFAULTS[name]
                raise ValueError(f"{name}: loss {loss!r} does not use it; expected {default}, found {value}")
        if not 0.0 <= used.get("label_smoothing", 0.0) < 0.5:
            raise ValueError(f"label_smoothing: expected a number in [0, 0.5), found {used['label_smoothing']}")
        return cls(loss, beta, tuple(used.items()), reduction)


OPTION_DEFAULTS: dict[str, float] = {"label_smoothing": 0.0}
"""Every option of any loss, with the value that leaves a loss plain."""


class PairTerms(NamedTuple):
    """One evaluation, float64, [T] each: losses (weighted), rewards, d(loss of a pair)/d(delta of its completions)."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_slope: Tensor
    rejected_slope: Tensor


def pair_terms(delta: Tensor, chosen: Tensor, rejected: Tensor, weights: Tensor | None, call: PairCall) -> PairTerms:
    """delta [C] float64 log ratios."""
    won, lost = delta[chosen], delta[rejected]
    losses, d_won, d_lost = LOSSES[call.loss].formula(won, lost, call.beta, dict(call.options))
    if weights is not None:
        # A pair of weight 0 counts for nothing, whatever its loss.
        w = weights.double()
        losses, d_won, d_lost = (torch.where(w == 0, 0.0, w * part) for part in (losses, d_won, d_lost))
    return PairTerms(losses, call.beta * won, call.beta * lost, d_won, d_lost)


def reduce_pairs(losses: Tensor, reduction: str) -> Tensor:
    """A mean divides by the number of pairs T, weighted or not; no pairs give 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / max(losses.numel(), 1) if reduction == "mean" else total


def delta_gradient(
    slopes: tuple[Tensor, Tensor], chosen: Tensor, rejected: Tensor, grad: Tensor, size: int, call: PairCall
) -> Tensor:
    """dL/ddelta [C] float64, from grad = dL/dloss (scalar, or [T] for reduction "none")."""
    grad = grad.double()
    if call.reduction == "mean":
        grad = grad / max(chosen.numel(), 1)
    d_won, d_lost = slopes
    result = torch.zeros(size, dtype=torch.float64, device=d_won.device)
    return result.index_add_(0, chosen, grad * d_won).index_add_(0, rejected, grad * d_lost)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, policy: Tensor, ref: Tensor, chosen: Tensor, rejected: Tensor, weights: Tensor | None, call: PairCall
    ):
        terms = pair_terms(policy.double() - ref.double(), chosen, rejected, weights, call)
        ctx.call, ctx.size, ctx.dtypes = call, policy.numel(), (policy.dtype, ref.dtype)
        ctx.save_for_backward(terms.chosen_slope, terms.rejected_slope, chosen, rejected)
        dtype = accumulation_dtype(policy.dtype, ref.dtype)
        rewards = terms.chosen_rewards.to(dtype), terms.rejected_rewards.to(dtype)
        ctx.mark_non_differentiable(*rewards)
        return reduce_pairs(terms.losses, call.reduction).to(dtype), *rewards

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_won, d_lost, chosen, rejected = ctx.saved_tensors
        grad = delta_gradient((d_won, d_lost), chosen, rejected, grad_outputs[0], ctx.size, ctx.call)
        policy, ref = ctx.needs_input_grad[:2]
        found = grad.to(ctx.dtypes[0]) if policy else None, -grad.to(ctx.dtypes[1]) if ref else None
        return *found, None, None, None, None


def check_pairs(
    chosen: Tensor, rejected: Tensor, weights: Tensor | None, completions: int | None
) -> tuple[Tensor, Tensor]:
    """chosen and rejected as int64 [T]."""
    if chosen.dim() != 1:
        raise ValueError(f"chosen: expected shape [T], found {list(chosen.shape)}")
    check_shape("rejected", rejected, chosen.shape, "one a pair, as chosen")
    if weights is not None:
        check_float("pair_weights", weights)
        check_shape("pair_weights", weights, chosen.shape, "one a pair")
    return check_index("chosen", chosen, completions), check_index("rejected", rejected, completions)


def pair_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    backend: str | None = None,
) -> PairLoss:
    """Preference loss of pairs of completions.

    policy_logps, ref_logps [C] log-probs of completions (sums over their tokens), any floating dtype; chosen, rejected
    [T] indices into them, a completion may be in many pairs; pair_weights [T] multiplies each pair's loss. `loss` is a
    name in `LOSSES`; label_smoothing (sigmoid only, in [0, 0.5)) makes it cDPO. reduction "mean" divides by T.
    Returns `PairLoss` in fp32 (float64 if an input is). ValueError: an unknown loss, an option the loss does not use.
    """
    check_float("policy_logps", policy_logps)
    check_float("ref_logps", ref_logps)
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps: expected shape [C], found {list(policy_logps.shape)}")
    check_shape("ref_logps", ref_logps, policy_logps.shape, "one a completion, as policy_logps")
    check_same_device(policy_logps=policy_logps, ref_logps=ref_logps, chosen=chosen, rejected=rejected)
    chosen, rejected = check_pairs(chosen, rejected, pair_weights, policy_logps.numel())
    call = PairCall.check(loss, beta, reduction, label_smoothing=label_smoothing)
    if resolve_backend(backend, policy_logps.device, policy_logps.dtype, ref_logps.dtype) == "triton":
        numbers = loss, beta, label_smoothing, reduction
        total, losses, (won, lost), *_ = operators.pair_loss(
            policy_logps, ref_logps, chosen, rejected, pair_weights, *numbers
        )
        return PairLoss(losses if reduction == "none" else total, won, lost)
    return PairLoss(*_PairLoss.apply(policy_logps, ref_logps, chosen, rejected, pair_weights, call))
