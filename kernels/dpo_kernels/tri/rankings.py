"""Plackett-Luce loss of rankings: values, rewards and gradient in one launch of one program, a thread a ranking.

C completions, R rankings of up to K places. Reading order: the two passes, forward kernel, backward kernel, launchers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import fixed
from .fixed import SUMS, scatter_items
from .pairs import THREADS, fixed_bits, pair_warps


@triton.jit
def fold_exponential(m, s, x, keep):
    """Fold float64 x, where kept, into a running logsumexp m + log(s)."""
    new = tl.where(keep, tl.maximum(m, x), m)
    term = tl.where(keep, tl.exp((x - new).to(tl.float32)), 0.0)
    return new, s * tl.exp((m - new).to(tl.float32)) + term


@triton.jit
def place(policy, ref, rankings, r, k, R, K, C, beta):
    """(float64 reward of place k of rankings r, whether there is one)."""
    c = tl.load(rankings + r * K + k, mask=r < R, other=-1)
    known = (c >= 0) & (c < C)
    delta = tl.load(policy + c, mask=known, other=0.0).to(tl.float64)
    delta -= tl.load(ref + c, mask=known, other=0.0).to(tl.float64)
    return tl.where((r < R) & (c >= C), float("nan"), delta * beta), (r < R) & (c >= 0)


@triton.jit
def ranking_forward_kernel(
    policy, ref, work, rankings, normalisers, loss, losses, rewards, slopes, grad, R, K, C, top, bits, beta, factor,
    REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """L = sum over places k < top of logsumexp(rewards from k on) - reward_k; normalisers [R, K] float64 is scratch."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    lowest = tl.full([BLOCK], -1e300, tl.float64)
    for first in range(0, R, BLOCK):
        r = first + lane
        m, s = lowest, tl.zeros([BLOCK], tl.float32)
        value = tl.zeros([BLOCK], tl.float64)
        for back in range(K):
            k = K - 1 - back
            reward, known = place(policy, ref, rankings, r, k, R, K, C, beta)
            m, s = fold_exponential(m, s, reward, known)
            normaliser = m + tl.log(tl.where(s > 0.0, s, 1.0)).to(tl.float64)
            value += tl.where(known & (k < top), normaliser - reward, 0.0)
            tl.store(normalisers + r * K + k, normaliser, mask=r < R)
            tl.store(rewards + r * K + k, tl.where(known, reward, 0.0).to(tl.float32), mask=r < R)
        tl.store(losses + r, value.to(tl.float32), mask=r < R)
        total += value
        # dL/dreward_j = sum over k <= min(j, top - 1) of e^(reward_j - normaliser_k), less 1 where j is in the top.
        m, s = lowest, tl.zeros([BLOCK], tl.float32)
        for k in range(K):
            reward, known = place(policy, ref, rankings, r, k, R, K, C, beta)
            normaliser = tl.load(normalisers + r * K + k, mask=r < R, other=0.0)
            m, s = fold_exponential(m, s, -normaliser, known & (k < top))
            share = tl.exp((reward + m).to(tl.float32)) * s
            slope = beta * (share - tl.where(k < top, 1.0, 0.0))
            tl.store(slopes + r * K + k, tl.where(known, slope, 0.0), mask=r < R)
    tl.store(loss, (tl.sum(total, axis=0) * factor).to(tl.float32))
    if REDUCED:
        tl.debug_barrier()
        scatter_items(slopes, losses, rankings, grad, work + SUMS, R * K, C, K, bits, factor, False, BLOCK)


@triton.jit
def ranking_backward_kernel(
    slopes, upstream, rankings, grad, work, items, C, group, bits, BLOCK: tl.constexpr
):  # fmt: skip
    """Gradient of unreduced losses: each ranking's slopes times its own upstream gradient."""
    scatter_items(slopes, upstream, rankings, grad, work + SUMS, items, C, group, bits, 1.0, True, BLOCK)


@dataclass(frozen=True)
class RankingOutputs:
    """fp32, no two in one storage. loss: scalar; losses [R]; rewards and slopes [R, K], 0 where padded; grad [C] is
    dloss/dpolicy, [0] for unreduced losses.
    """

    loss: torch.Tensor
    losses: torch.Tensor
    rewards: torch.Tensor
    slopes: torch.Tensor
    grad: torch.Tensor

    @classmethod
    def allocate(
        cls, like: torch.Tensor, rankings: int, places: int, completions: int, reduction: str
    ) -> "RankingOutputs":
        shapes = ((), (rankings,), (rankings, places), (rankings, places), (0 if reduction == "none" else completions,))
        return cls(*(like.new_empty(shape, dtype=torch.float32) for shape in shapes))

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.loss, self.losses, self.rewards, self.slopes, self.grad


def ranking_forward(
    policy: torch.Tensor, ref: torch.Tensor, rankings: torch.Tensor, beta: float, reduction: str, top: int,
    *, work: torch.Tensor | None = None,
) -> RankingOutputs:  # fmt: skip
    """policy, ref [C], rankings [R, K] int64 (best first, padded with -1); only the first `top` places are choices."""
    (count, places), completions, device = rankings.shape, policy.numel(), policy.device
    out = RankingOutputs.allocate(policy, count, places, completions, reduction)
    scratch = torch.empty(count, places, dtype=torch.float64, device=device)
    work = fixed.workspace(device, completions) if work is None else work
    factor = 1.0 / max(count, 1) if reduction == "mean" else 1.0
    ranking_forward_kernel[(1,)](
        policy.contiguous(), ref.contiguous(), work, rankings.contiguous(), scratch, *out.tensors, count, places,
        completions, top, fixed_bits(count * places), beta, factor, REDUCED=reduction != "none", BLOCK=THREADS,
        num_warps=pair_warps(device),
    )  # fmt: skip
    return out


def ranking_backward(
    slopes: torch.Tensor, upstream: torch.Tensor, rankings: torch.Tensor, completions: int,
    *, work: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """dL/dpolicy [C] fp32 from dL/dlosses [R] fp32."""
    count, places = rankings.shape
    grad = torch.empty(completions, dtype=torch.float32, device=upstream.device)
    work = fixed.workspace(upstream.device, completions) if work is None else work
    ranking_backward_kernel[(1,)](
        slopes, upstream.contiguous(), rankings.contiguous(), grad, work, count * places, completions, places,
        fixed_bits(count * places), BLOCK=THREADS, num_warps=pair_warps(upstream.device),
    )  # fmt: skip
    return grad
