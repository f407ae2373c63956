"""Pair losses: values, rewards and gradient in one launch of one program.

C completions, T pairs. Reading order: the pass over the pairs, forward kernel, backward kernel, launchers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import fixed, rows
from .fixed import SUMS, published, scatter_pairs
from .losses import KernelCall, quotient, sum_of_losses

THREADS = 256
"""Of the one program that works on pairs; also pairs a pass, so that each thread rereads only what it wrote itself."""

NO_REFERENCE, TOKEN_REFERENCE, COMPLETION_REFERENCE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def completion_values(
    policy, ref, lengths, work, completion, known, C,
    IN_WORK: tl.constexpr, REFERENCE: tl.constexpr, MIXED: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """(log ratio, policy's log-prob, 1 / tokens) of completions, float64; NaN for one that does not exist."""
    nothing = tl.full(completion.shape, float("nan"), tl.float64)
    if IN_WORK:
        logp = tl.where(known, published(work + SUMS, completion, C, known), nothing)
    else:
        logp = tl.load(policy + completion, mask=known, other=float("nan")).to(tl.float64)
    delta = logp
    if REFERENCE == COMPLETION_REFERENCE:
        delta = logp - tl.load(ref + completion, mask=known, other=0.0).to(tl.float64)
    if MIXED and IN_WORK and REFERENCE == TOKEN_REFERENCE:
        logp = tl.where(known, published(work + SUMS + 4 * C, completion, C, known), nothing)
    share = tl.full(completion.shape, 1.0, tl.float64)
    if LENGTHS:
        if IN_WORK:
            tokens = tl.load(work + SUMS + 6 * C + completion, mask=known, other=1, cache_modifier=".cg")
        else:
            tokens = tl.load(lengths + completion, mask=known, other=1)
        share = quotient(1.0, tl.maximum(tokens, 1).to(tl.float64))
    return delta, logp, share


@triton.jit
def pass_over_pairs(
    policy, ref, lengths, work, chosen, rejected, weights, loss, losses, won_rewards, lost_rewards, won_slopes,
    lost_slopes, T, C, beta, numbers, factor,
    TERMS: tl.constexpr, IN_WORK: tl.constexpr, REFERENCE: tl.constexpr, MIXED: tl.constexpr, LENGTHS: tl.constexpr,
    MEAN_REWARDS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Losses, rewards and slopes of every pair, and factor * the sum of the losses."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, T, BLOCK):
        pair = first + lane
        inside = pair < T
        i = tl.load(chosen + pair, mask=inside, other=-1)
        j = tl.load(rejected + pair, mask=inside, other=-1)
        won, won_lp, won_share = completion_values(
            policy, ref, lengths, work, i, (i >= 0) & (i < C), C, IN_WORK, REFERENCE, MIXED, LENGTHS
        )
        lost, lost_lp, lost_share = completion_values(
            policy, ref, lengths, work, j, (j >= 0) & (j < C), C, IN_WORK, REFERENCE, MIXED, LENGTHS
        )
        won_reward = won * (won_share if MEAN_REWARDS else 1.0) * beta
        lost_reward = lost * (lost_share if MEAN_REWARDS else 1.0) * beta
        tl.store(won_rewards + pair, won_reward.to(tl.float32), mask=inside)
        tl.store(lost_rewards + pair, lost_reward.to(tl.float32), mask=inside)
        value, won_slope, lost_slope = sum_of_losses(
            won, lost, won_lp, lost_lp, won_share, lost_share, beta, numbers, TERMS
        )
        if WEIGHTED:
            # A pair of weight 0 counts for nothing, whatever its loss.
            weight = tl.load(weights + pair, mask=inside, other=0.0).to(tl.float32)
            value = tl.where(weight == 0.0, 0.0, weight * value)
            won_slope = tl.where(weight == 0.0, 0.0, weight * won_slope)
            lost_slope = tl.where(weight == 0.0, 0.0, weight * lost_slope)
        total += tl.where(inside, value, 0.0).to(tl.float64)
        tl.store(losses + pair, value, mask=inside)
        tl.store(won_slopes + pair, won_slope, mask=inside)
        tl.store(lost_slopes + pair, lost_slope, mask=inside)
    tl.store(loss, (tl.sum(total, axis=0) * factor).to(tl.float32))


@triton.jit
def pair_forward_kernel(
    policy, ref, lengths, work, chosen, rejected, weights, loss, losses, won_rewards, lost_rewards, won_slopes,
    lost_slopes, grad, T, C, bits, beta, numbers, factor,
    TERMS: tl.constexpr, REFERENCE: tl.constexpr, LENGTHS: tl.constexpr, MEAN_REWARDS: tl.constexpr,
    WEIGHTED: tl.constexpr, REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pass_over_pairs(
        policy, ref, lengths, work, chosen, rejected, weights, loss, losses, won_rewards, lost_rewards, won_slopes,
        lost_slopes, T, C, beta, numbers, factor, TERMS, False, REFERENCE, False, LENGTHS, MEAN_REWARDS, WEIGHTED,
        BLOCK,
    )  # fmt: skip
    if REDUCED:
        tl.debug_barrier()
        scatter_pairs(
            won_slopes, lost_slopes, losses, chosen, rejected, grad, work + SUMS, T, C, bits, factor, False, BLOCK
        )


@triton.jit
def pair_backward_kernel(
    won_slopes, lost_slopes, upstream, chosen, rejected, grad, work, T, C, bits, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of unreduced losses: each pair's slopes times its own upstream gradient."""
    scatter_pairs(won_slopes, lost_slopes, upstream, chosen, rejected, grad, work + SUMS, T, C, bits, 1.0, True, BLOCK)


@dataclass(frozen=True)
class PairOutputs:
    """fp32, no two in one storage."""

    loss: torch.Tensor
    """Scalar."""
    losses: torch.Tensor
    """[T]"""
    rewards: torch.Tensor
    """[2, T]: chosen, rejected."""
    slopes: torch.Tensor
    """[2, T]: dloss/ddelta of a pair's chosen and rejected completion."""
    grad: torch.Tensor
    """[C] dloss/dpolicy; [0] for unreduced losses."""

    @classmethod
    def allocate(cls, like: torch.Tensor, pairs: int, completions: int, reduction: str) -> "PairOutputs":
        shapes = ((), (pairs,), (2, pairs), (2, pairs), (0 if reduction == "none" else completions,))
        return cls(*(like.new_empty(shape, dtype=torch.float32) for shape in shapes))

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.loss, self.losses, self.rewards, self.slopes, self.grad

    @property
    def arguments(self) -> tuple[torch.Tensor, ...]:
        """As the kernels take them."""
        return self.loss, self.losses, *self.rewards, *self.slopes, self.grad


def fixed_bits(pairs: int) -> int:
    """Bits that the number of terms of a completion's gradient needs: it is in at most 2T places."""
    return max(1, 2 * pairs).bit_length()


def pair_warps(device: torch.device) -> int:
    return THREADS // rows.warp_size(device)


def reduction_factor(reduction: str, pairs: int) -> float:
    return 1.0 / max(pairs, 1) if reduction == "mean" else 1.0


def pair_forward(
    policy: torch.Tensor, ref: torch.Tensor | None, chosen: torch.Tensor, rejected: torch.Tensor,
    weights: torch.Tensor | None, call: KernelCall, *, lengths: torch.Tensor | None = None,
    work: torch.Tensor | None = None,
) -> PairOutputs:  # fmt: skip
    """policy, ref [C] of any floating dtypes (ref None: zero), chosen, rejected [T] int64, weights [T] or None, lengths
    [C] of integers where the call divides by them -> `PairOutputs`.
    """
    pairs, completions, device = chosen.numel(), policy.numel(), policy.device
    out = PairOutputs.allocate(policy, pairs, completions, call.reduction)
    work = fixed.workspace(device, completions) if work is None else work
    policy = policy.contiguous()
    pair_forward_kernel[(1,)](
        policy, policy if ref is None else ref.contiguous(), work if lengths is None else lengths.contiguous(), work,
        chosen.contiguous(), rejected.contiguous(), out.losses if weights is None else weights.contiguous(),
        *out.arguments, pairs, completions, fixed_bits(pairs), call.beta, call.term_numbers,
        reduction_factor(call.reduction, pairs), TERMS=call.codes,
        REFERENCE=(NO_REFERENCE if ref is None else COMPLETION_REFERENCE).value, LENGTHS=call.lengths,
        MEAN_REWARDS=call.mean_rewards, WEIGHTED=weights is not None, REDUCED=call.reduction != "none", BLOCK=THREADS,
        num_warps=pair_warps(device),
    )  # fmt: skip
    return out


def pair_backward(
    slopes: torch.Tensor, upstream: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor, completions: int,
    *, work: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dL/dpolicy [C] fp32 from slopes [2, T] and dL/dlosses [T] fp32."""
    grad = torch.empty(completions, dtype=torch.float32, device=upstream.device)
    work = fixed.workspace(upstream.device, completions) if work is None else work
    pair_backward_kernel[(1,)](
        *slopes, upstream.contiguous(), chosen.contiguous(), rejected.contiguous(), grad, work, chosen.numel(),
        completions, fixed_bits(chosen.numel()), BLOCK=THREADS, num_warps=pair_warps(upstream.device),
    )  # fmt: skip
    return grad
