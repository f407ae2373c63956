"""pair_loss: losses on (chosen, rejected) pairs of completions.

Shapes: C completions, T pairs. All arithmetic is float64. Order: forward, autograd, public function.
"""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import operators
from .backends import resolve_backend
from .calls import PairCall
from .common import accumulation_dtype, check_float, check_index, check_same_device, check_shape
from .formulas import Side
from .losses import LossOptions


class PairLoss(NamedTuple):
    """loss: scalar ([T] for reduction "none"); rewards [T], detached: beta times the log ratio of policy to reference.

    For losses without a reference beta times the policy's log-prob, over its tokens where the loss has it so (simpo,
    alphapo, orpo).
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class Slopes(NamedTuple):
    """d(loss of a pair)/d(log-prob of a completion), float64 [T] each: through log ratios, and directly.

    They are kept apart since LD-DPO weights the tokens of a log ratio alone.
    """

    chosen_delta: Tensor
    rejected_delta: Tensor
    chosen_logp: Tensor
    rejected_logp: Tensor

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """By the log-probs of chosen and rejected completions, whichever way."""
        return self.chosen_delta + self.chosen_logp, self.rejected_delta + self.rejected_logp


class PairTerms(NamedTuple):
    """One evaluation, float64, [T] each: losses (weighted), rewards, slopes."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    slopes: Slopes


def pair_terms(won: Side, lost: Side, weights: Tensor | None, call: PairCall) -> PairTerms:
    """The weighted sum of the call's losses, each pair times its weight."""
    losses = torch.zeros_like(won.delta)
    slopes = [torch.zeros_like(won.delta) for _ in Slopes._fields]
    for term in call.terms:
        loss, d_won, d_lost = term.entry.formula(won, lost, call.beta, term.values)
        losses = losses + term.weight * loss
        first = 0 if term.entry.reference else 2
        slopes[first] = slopes[first] + term.weight * d_won
        slopes[first + 1] = slopes[first + 1] + term.weight * d_lost
    if weights is not None:
        # A pair of weight 0 counts for nothing, whatever its loss.
        w = weights.double()
        losses, *slopes = (torch.where(w == 0, 0.0, w * part) for part in (losses, *slopes))
    won_reward, lost_reward = (call.beta * (s.logp / s.length if call.mean_rewards else s.delta) for s in (won, lost))
    return PairTerms(losses, won_reward, lost_reward, Slopes(*slopes))


def reduce_pairs(losses: Tensor, reduction: str) -> Tensor:
    """A mean divides by the number of pairs T, weighted or not; no pairs give 0."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total / max(losses.numel(), 1) if reduction == "mean" else total


def pair_gradient(grad: Tensor, pairs: int, call: PairCall) -> Tensor:
    """d(loss)/d(loss of a pair), float64 scalar or [T], from grad = dL/dloss."""
    grad = grad.double()
    return grad / max(pairs, 1) if call.reduction == "mean" else grad


def completion_gradient(
    slopes: tuple[Tensor, Tensor], chosen: Tensor, rejected: Tensor, grad: Tensor, size: int, call: PairCall
) -> Tensor:
    """dL/dlp [C] float64, from grad = dL/dloss (scalar, or [T] for reduction "none")."""
    grad = pair_gradient(grad, chosen.numel(), call)
    d_won, d_lost = slopes
    result = torch.zeros(size, dtype=torch.float64, device=d_won.device)
    return result.index_add_(0, chosen, grad * d_won).index_add_(0, rejected, grad * d_lost)


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        policy: Tensor,
        ref: Tensor | None,
        chosen: Tensor,
        rejected: Tensor,
        weights: Tensor | None,
        lengths: Tensor | None,
        call: PairCall,
    ):
        logp = policy.double()
        base = torch.zeros_like(logp) if ref is None else ref.double()
        length = torch.ones_like(logp) if lengths is None else lengths.double().clamp(min=1)
        won, lost = (Side(*(part[side] for part in (logp - base, base, logp, length))) for side in (chosen, rejected))
        terms = pair_terms(won, lost, weights, call)
        ctx.call, ctx.size, ctx.dtypes = call, policy.numel(), (policy.dtype, None if ref is None else ref.dtype)
        ctx.save_for_backward(*terms.slopes, chosen, rejected)
        dtype = accumulation_dtype(policy.dtype, policy.dtype if ref is None else ref.dtype)
        rewards = terms.chosen_rewards.to(dtype), terms.rejected_rewards.to(dtype)
        ctx.mark_non_differentiable(*rewards)
        return reduce_pairs(terms.losses, call.reduction).to(dtype), *rewards

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        *slopes, chosen, rejected = ctx.saved_tensors
        slopes = Slopes(*slopes)
        of_policy, of_ref = ctx.needs_input_grad[:2]
        arguments = chosen, rejected, grad_outputs[0], ctx.size, ctx.call
        grad = completion_gradient(slopes.sides, *arguments)
        found = grad.to(ctx.dtypes[0]) if of_policy else None, -grad.to(ctx.dtypes[1]) if of_ref else None
        return *found, *(None,) * 5


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


def check_call(call: PairCall, ref_logps: Tensor | None, pair_weights: Tensor | None) -> None:
    """Refuses a reference or weights that the loss would ignore."""
    if ref_logps is not None and not call.reference:
        raise ValueError(f"ref_logps: loss {call.name!r} uses no reference; expected None, found a tensor")
    if pair_weights is not None and call.coupled == "batch":
        raise ValueError(f"pair_weights: loss {call.name!r} sorts the pairs; expected None, found a tensor")


def check_reference_gradient(call: PairCall, ref_logps: Tensor) -> None:
    """Only where the loss depends on log ratios alone is the reference's gradient the policy's, negated."""
    ratios_alone = all(term.entry.reference and term.name != "aot" for term in call.terms)
    if ref_logps.requires_grad and not ratios_alone:
        raise ValueError(f"ref_logps: loss {call.name!r} gives it no gradient; expected one that requires none")


def pair_loss(
    policy_logps: Tensor,
    ref_logps: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
    **options: Unpack[LossOptions],
) -> PairLoss:
    """Preference loss of pairs of completions.

    policy_logps, ref_logps [C] log-probs of completions (sums over their tokens), any floating dtype (ref_logps None:
    zero; losses without a reference expect None); chosen, rejected [T] indices into them, a completion may be in many
    pairs; pair_weights [T] multiplies each pair's loss; lengths [C] tokens of completions, for losses that divide by
    them. `loss` is a name in `LOSSES` or a weighted sum "sigmoid:1,sft:0.1"; `options` are those of its terms
    (`LossOptions`; not `ld_alpha` and `wpo`, which need log-probs per token). reduction "mean" divides by T. Losses
    that sort the batch run on torch. Returns `PairLoss` in fp32 (float64 if an input is). ValueError names a bad
    argument, and any option that the loss does not use.
    """
    call = PairCall.check(loss, beta, reduction, **options)
    if call.rows:
        name = "wpo" if call.wpo else "ld_alpha"
        raise ValueError(f"{name}: needs log-probs per token: expected token_pair_loss or linear_dpo_loss")
    check_call(call, ref_logps, pair_weights)
    check_float("policy_logps", policy_logps)
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps: expected shape [C], found {list(policy_logps.shape)}")
    dtypes = [policy_logps.dtype]
    if ref_logps is not None:
        check_float("ref_logps", ref_logps)
        check_shape("ref_logps", ref_logps, policy_logps.shape, "one a completion, as policy_logps")
        check_reference_gradient(call, ref_logps)
        dtypes.append(ref_logps.dtype)
    check_lengths(lengths, policy_logps.numel(), call)
    check_same_device(policy_logps=policy_logps, ref_logps=ref_logps, lengths=lengths, chosen=chosen, rejected=rejected)
    chosen, rejected = check_pairs(chosen, rejected, pair_weights, policy_logps.numel())
    if not call.in_kernel:
        if backend == "triton":
            raise ValueError(f"backend: loss {call.name!r} runs on torch; expected None or 'torch', found 'triton'")
        backend = "torch"
    if resolve_backend(backend, policy_logps.device, *dtypes) == "triton":
        total, losses, (won, lost), *_ = operators.pair_loss(
            *(policy_logps, ref_logps, chosen, rejected, pair_weights, lengths),
            *(call.codes, call.numbers, beta, call.mean_rewards, reduction),
        )
        return PairLoss(losses if reduction == "none" else total, won, lost)
    return PairLoss(*_PairLoss.apply(policy_logps, ref_logps, chosen, rejected, pair_weights, lengths, call))


def check_lengths(lengths: Tensor | None, completions: int, call: PairCall) -> None:
    if (lengths is None) == call.lengths:
        uses, found = ("divides by", "None") if call.lengths else ("does not use", "a tensor")
        raise ValueError(f"lengths: loss {call.name!r} {uses} lengths, found {found}")
    if lengths is not None:
        check_shape("lengths", lengths, (completions,), "one a completion")
        check_index("lengths", lengths, None)
