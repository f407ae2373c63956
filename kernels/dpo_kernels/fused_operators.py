"""Logits to preference loss as `torch.library` operators: one launch forward, one launch backward.

N rows, V vocabulary, C completions, T pairs. As `operators.py`, which see.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .operators import _like_gradient, _like_pairs, _options


@torch.library.custom_op("dpo_kernels::dpo_loss_from_logits", mutates_args=())
def dpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    completion_ids: Tensor | None,
    ref: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None,
    completions: int,
    ref_per_token: bool,
    in_place: bool,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    codes: Sequence[int],
    numbers: Sequence[float],
    beta: float,
    mean_rewards: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`tri.PairOutputs`, then logps, row maximum and 1/sum, each [N]. Gradient: loss, or losses if unreduced."""
    from . import tri

    options = _options(ignore_index, temperature, logit_scale, softcap)
    call = tri.KernelCall(tuple(codes), tuple(numbers), beta, mean_rewards, reduction)
    out = tri.fused_forward(
        logits, targets, completion_ids, ref, chosen, rejected, weights, completions, options, call,
        ref_per_token=ref_per_token,
    )  # fmt: skip
    return *out.pairs.tensors, out.logps, out.row_max, out.row_inv_sum


@dpo_loss_from_logits.register_fake
def _(logits, targets, completion_ids, ref, chosen, rejected, weights, completions, *numbers):
    rows = [logits.new_empty(targets.numel(), dtype=torch.float32) for _ in range(3)]
    return *_like_pairs(logits, chosen.numel(), completions, numbers[-1]), *rows


@torch.library.custom_op("dpo_kernels::dpo_loss_from_logits_backward", mutates_args=())
def dpo_loss_from_logits_backward(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    completion_ids: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    slopes: Tensor,
    grad: Tensor,
    row_max: Tensor,
    row_inv_sum: Tensor,
    completions: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    """dL/dlogits from upstream = dL/dloss, a scalar, or [T] if unreduced."""
    return _backward(
        upstream, logits, targets, completion_ids, chosen, rejected, slopes, grad, row_max, row_inv_sum,
        completions, _options(ignore_index, temperature, logit_scale, softcap), reduction, in_place=False,
    )  # fmt: skip


@dpo_loss_from_logits_backward.register_fake
def _(upstream, logits, *_):
    return _like_gradient(logits, "triton")


@torch.library.custom_op("dpo_kernels::dpo_loss_from_logits_backward_", mutates_args={"logits"})
def dpo_loss_from_logits_backward_(
    upstream: Tensor,
    logits: Tensor,
    targets: Tensor,
    completion_ids: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    slopes: Tensor,
    grad: Tensor,
    row_max: Tensor,
    row_inv_sum: Tensor,
    completions: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    reduction: str,
) -> None:
    """Write dL/dlogits over the logits."""
    _backward(
        upstream, logits, targets, completion_ids, chosen, rejected, slopes, grad, row_max, row_inv_sum,
        completions, _options(ignore_index, temperature, logit_scale, softcap), reduction, in_place=True,
    )  # fmt: skip


@dpo_loss_from_logits_backward_.register_fake
def _(upstream, logits, *_):
    return None


def _backward(
    upstream, logits, targets, completion_ids, chosen, rejected, slopes, grad, row_max, row_inv_sum, completions,
    options, reduction, *, in_place,
) -> Tensor:  # fmt: skip
    from . import tri

    pairs = tri.PairOutputs(grad, grad, slopes, slopes, grad)
    out = tri.FusedOutputs(row_max, row_max, row_inv_sum, pairs)
    index = chosen, rejected
    return tri.fused_backward(
        logits, targets, completion_ids, *index, out, upstream, completions, options, reduction, in_place=in_place
    )


def _save(ctx, inputs, output) -> None:
    logits, targets, ids, _, chosen, rejected, _, ctx.completions, _, ctx.in_place, *numbers = inputs
    ctx.numbers, ctx.reduction = numbers[:4], numbers[-1]
    _, _, _, slopes, grad, _, row_max, row_inv_sum = output
    ctx.save_for_backward(logits, targets, ids, chosen, rejected, slopes, grad, row_max, row_inv_sum)
    ctx.mark_non_differentiable(*(output[:1] if ctx.reduction == "none" else output[1:2]), *output[2:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, loss, losses, *_):
    upstream = losses if ctx.reduction == "none" else loss
    if upstream is None:
        return (None,) * 19
    logits, *rest = ctx.saved_tensors
    arguments = upstream.contiguous(), logits, *rest, ctx.completions, *ctx.numbers, ctx.reduction
    if ctx.in_place:
        dpo_loss_from_logits_backward_(*arguments)
        return (logits, *(None,) * 18)
    return (dpo_loss_from_logits_backward(*arguments), *(None,) * 18)


dpo_loss_from_logits.register_autograd(_gradient, setup_context=_save)
