"""ranking_loss: Plackett-Luce loss of rankings of completions (Rafailov et al. 2023, A.3).

C completions, R rankings of up to K places. Order: torch path, public function.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import operators
from .backends import resolve_backend
from .calls import REDUCTIONS
from .common import accumulation_dtype, check_float, check_index, check_same_device, check_shape


class RankingLoss(NamedTuple):
    """loss: scalar ([R] for reduction "none"); rewards [R, K] beta * (policy - reference), 0 where padded, detached."""

    loss: Tensor
    rewards: Tensor


def ranking_terms(rewards: Tensor, present: Tensor, top: int) -> Tensor:
    """[R] losses from rewards [R, K]: sum over present places k < top of logsumexp(rewards from k on) - reward_k."""
    hidden = rewards.masked_fill(~present, float("-inf"))
    normaliser = hidden.flip(1).logcumsumexp(1).flip(1)
    counts = present & (torch.arange(rewards.shape[1], device=rewards.device) < top)
    return torch.where(counts, normaliser - rewards, 0.0).sum(1)


def ranking_loss(
    policy_logps: Tensor,
    ref_logps: Tensor,
    rankings: Tensor,
    *,
    beta: float = 0.1,
    reduction: str = "mean",
    top_k: int | None = None,
    backend: str | None = None,
) -> RankingLoss:
    """Plackett-Luce: -sum_k log (e^{r_tau(k)} / sum_{j >= k} e^{r_tau(j)}), r = beta * (policy - reference).

    policy_logps, ref_logps [C] log-probs of completions, any floating dtype; rankings [R, K] indices into them, the
    best first, padded at the end with -1. With `top_k` only the first top_k places are choices: what follows counts as
    merely worse than they are, in no order. A ranking of two is a pair of the sigmoid loss. reduction "mean" divides by
    R. Returns `RankingLoss` in fp32 (float64 if an input is). ValueError names a bad argument.
    """
    check_float("policy_logps", policy_logps)
    check_float("ref_logps", ref_logps)
    if policy_logps.dim() != 1:
        raise ValueError(f"policy_logps: expected shape [C], found {list(policy_logps.shape)}")
    check_shape("ref_logps", ref_logps, policy_logps.shape, "one a completion, as policy_logps")
    if rankings.dim() != 2:
        raise ValueError(f"rankings: expected shape [R, K], found {list(rankings.shape)}")
    check_same_device(policy_logps=policy_logps, ref_logps=ref_logps, rankings=rankings)
    rankings = check_index("rankings", rankings, policy_logps.numel(), lower=-1)
    if not beta > 0:
        raise ValueError(f"beta: expected a number above 0, found {beta}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected 1 or more, or None, found {top_k}")
    top = rankings.shape[1] if top_k is None else top_k
    if resolve_backend(backend, policy_logps.device, policy_logps.dtype, ref_logps.dtype) == "triton":
        total, losses, rewards, *_ = operators.ranking_loss(policy_logps, ref_logps, rankings, beta, reduction, top)
        return RankingLoss(losses if reduction == "none" else total, rewards)
    dtype = accumulation_dtype(policy_logps.dtype, ref_logps.dtype)
    present = rankings >= 0
    delta = (policy_logps.double() - ref_logps.double())[rankings.clamp(min=0)]
    rewards = torch.where(present, beta * delta, 0.0)
    losses = ranking_terms(rewards, present, top)
    if reduction != "none":
        losses = losses.sum() / (max(rankings.shape[0], 1) if reduction == "mean" else 1)
    return RankingLoss(losses.to(dtype), rewards.detach().to(dtype))
