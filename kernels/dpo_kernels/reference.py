"""Eager, readable truth for every function: plain torch and autograd, any dtype. Calls none of our kernels.

Shapes: N rows, V vocabulary, H hidden, C completions, T pairs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference_losses import Completions, sum_of_losses


def shape_logits(
    logits: Tensor, *, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """x = cap(logit_scale * logits) / temperature."""
    x = logits * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    return x / temperature


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax(x)[target] for logits [..., V], targets [...]; 0 where the target is `ignore_index`."""
    keep = targets != ignore_index
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    x = shape_logits(logits[keep].to(dtype), temperature=temperature, logit_scale=logit_scale, softcap=softcap)
    logps = x.log_softmax(-1).gather(-1, targets[keep].unsqueeze(-1)).squeeze(-1)
    return torch.zeros(targets.shape, dtype=dtype, device=logits.device).masked_scatter(keep, logps)


def token_stats(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, **options) -> dict[str, Tensor]:
    """The statistics of `TokenStats`, [...] each; 0 where ignored."""
    keep = targets != ignore_index
    x = shape_logits(logits.detach(), **options)
    logp = x.log_softmax(-1)
    p = logp.exp()
    target = x.gather(-1, targets.where(keep, 0).unsqueeze(-1)).squeeze(-1)
    found = {
        "entropy": -torch.where(p > 0, p * logp, 0).sum(-1),
        "max_is_target": target >= x.amax(-1),
        "mean_logit": x.mean(-1),
        "log_sum_sq": (2 * logp).logsumexp(-1),
    }
    return {name: torch.where(keep, value, torch.zeros_like(value)) for name, value in found.items()}


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,
    ignore_index: int = -100,
    **options,
) -> Tensor:
    """token_logps of hidden [N, H] @ (weight [V, H] + scaling * b [V, r] @ a [r, H]).T + bias [V]."""
    logits = F.linear(hidden, weight, bias)
    if lora is not None:
        a, b, scaling = lora
        logits = logits + scaling * F.linear(F.linear(hidden, a), b)
    return token_logps(logits, targets, ignore_index=ignore_index, **options)


def completion_sums(values: Tensor, completion_ids: Tensor, num_completions: int) -> Tensor:
    """[C] sums of values [N] per completion; rows with id -1 belong to none."""
    keep = completion_ids >= 0
    return values.new_zeros(num_completions).index_add(0, completion_ids[keep], values[keep])


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
    **options,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and rewards by the formulas of `reference_losses.py`; a sum as "sigmoid:1,sft:0.1"."""
    zero = torch.zeros_like(policy_logps)
    ref = zero if ref_logps is None else ref_logps
    length = torch.ones_like(policy_logps) if lengths is None else lengths.to(policy_logps.dtype)
    won, lost = (Completions(policy_logps[side], ref[side], length[side]) for side in (chosen, rejected))
    losses = sum_of_losses(loss, won, lost, beta, options)
    if pair_weights is not None:
        losses = losses * pair_weights
    if reduction == "sum":
        losses = losses.sum()
    elif reduction == "mean":
        losses = losses.sum() / max(chosen.numel(), 1)
    of_means = loss.split(":")[0] in ("simpo", "alphapo", "orpo")
    rewards = beta * (policy_logps / length if of_means else policy_logps - ref)
    return losses, rewards[chosen].detach(), rewards[rejected].detach()


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    completion_ids: Tensor,
    ref_logps: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    *,
    num_completions: int,
    bias: Tensor | None = None,
    logit_options: dict | None = None,
    **loss_options,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-token reference log-probs [N], or None; log ratios summed token by token: loss, rewards, token log-probs."""
    logps = linear_token_logps(hidden, weight, targets, bias=bias, **(logit_options or {}))
    ratio = logps if ref_logps is None else logps - ref_logps
    delta = completion_sums(ratio, completion_ids, num_completions)
    loss, won, lost = pair_loss(delta, None, chosen, rejected, **loss_options)
    return loss, won, lost, logps.detach()
