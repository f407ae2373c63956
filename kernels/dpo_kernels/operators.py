"""The public functions' cores as `torch.library` operators: fixed schemas, shapes for tracing, autograd.

N rows, V vocabulary, C completions, T pairs, R rankings of K places. Operators take numbers instead of options
(soft-cap 0: none; statistics a bit mask in the order of `common.STATS`) and the backend's name. Gradients flow only
into the outputs named in each docstring. Order: log-probs, pairs, rankings, logits to loss.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .common import STATS, LogitOptions, accumulation_dtype

VEC_BYTES = 16


def _options(ignore_index: int, temperature: float, logit_scale: float, softcap: float) -> LogitOptions:
    return LogitOptions(ignore_index, temperature, logit_scale, softcap or None)


def _phase(logits: Tensor) -> int:
    """`tri.rows.phase_of` without an address: storages begin on 16-byte boundaries."""
    return int(logits.storage_offset() % (VEC_BYTES // logits.dtype.itemsize))


def _like_gradient(logits: Tensor, backend: str) -> Tensor:
    if backend == "torch":
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    from .tri import empty_in_phase

    source = logits if logits.stride(-1) == 1 or logits.shape[-1] == 1 else logits.contiguous()
    return empty_in_phase(source, _phase(source))


@torch.library.custom_op("dpo_kernels::token_logps", mutates_args=())
def token_logps(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    stats: int,
    in_place: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logits [..., V], targets [N] -> logps, row maximum, 1/sum, each [N], and statistics [count, N]. Gradient:
    logps.
    """
    options = _options(ignore_index, temperature, logit_scale, softcap)
    if backend == "triton":
        from . import tri

        return tri.logps_forward(logits, targets, options, stats)
    from . import logps as torch_path

    names = tuple(name for bit, name in enumerate(STATS) if stats >> bit & 1)
    call = torch_path.LogpsCall(options, names, accumulation_dtype(logits.dtype))
    logps, maximum, inverse, found = torch_path.logps_forward(logits, targets, call)
    rows = [found[name].to(call.dtype) for name in names]
    return logps, maximum, inverse, torch.stack(rows) if rows else logps.new_empty(0, targets.numel())


@token_logps.register_fake
def _(logits, targets, ignore_index, temperature, logit_scale, softcap, stats, in_place, backend):
    dtype = accumulation_dtype(logits.dtype)
    rows = [logits.new_empty(targets.numel(), dtype=dtype) for _ in range(3)]
    return *rows, logits.new_empty(stats.bit_count(), targets.numel(), dtype=dtype)


@torch.library.custom_op("dpo_kernels::token_logps_backward", mutates_args=())
def token_logps_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    logps: Tensor,
    maximum: Tensor,
    inverse: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    backend: str,
) -> Tensor:
    """dL/dlogits [..., V] from grad = dL/dlogps [N]."""
    options = _options(ignore_index, temperature, logit_scale, softcap)
    if backend == "triton":
        from . import tri

        return tri.logps_backward(logits, targets, maximum, inverse, grad, options)
    from . import logps as torch_path

    call = torch_path.LogpsCall(options, (), accumulation_dtype(logits.dtype))
    return torch_path.logps_backward(logits, targets, logps, maximum, inverse, grad, call)


@token_logps_backward.register_fake
def _(grad, logits, targets, logps, maximum, inverse, ignore_index, temperature, logit_scale, softcap, backend):
    return _like_gradient(logits, backend)


@torch.library.custom_op("dpo_kernels::token_logps_backward_", mutates_args={"logits"})
def token_logps_backward_(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    inverse: Tensor,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
) -> None:
    """Write dL/dlogits over the logits (Triton only)."""
    from . import tri

    options = _options(ignore_index, temperature, logit_scale, softcap)
    tri.logps_backward(logits, targets, maximum, inverse, grad, options, in_place=True)


@token_logps_backward_.register_fake
def _(grad, logits, targets, maximum, inverse, ignore_index, temperature, logit_scale, softcap):
    return None


def _save_logps(ctx, inputs, output) -> None:
    logits, targets, *ctx.numbers, _, ctx.in_place, ctx.backend = inputs
    logps, maximum, inverse, _ = output
    ctx.save_for_backward(logits, targets, logps, maximum, inverse)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _logps_gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * 9
    logits, targets, logps, maximum, inverse = ctx.saved_tensors
    if ctx.in_place:
        token_logps_backward_(grad.contiguous(), logits, targets, maximum, inverse, *ctx.numbers)
        return (logits, *(None,) * 8)
    rows = targets, logps, maximum, inverse
    return (token_logps_backward(grad.contiguous(), logits, *rows, *ctx.numbers, ctx.backend), *(None,) * 8)


token_logps.register_autograd(_logps_gradient, setup_context=_save_logps)


@torch.library.custom_op("dpo_kernels::pair_loss", mutates_args=())
def pair_loss(
    policy: Tensor,
    ref: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    weights: Tensor | None,
    lengths: Tensor | None,
    codes: Sequence[int],
    numbers: Sequence[float],
    beta: float,
    mean_rewards: bool,
    reduction: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """policy, ref [C] (ref or None), chosen, rejected [T] -> `tri.PairOutputs`; codes and numbers of `PairCall`.
    Gradient: loss, or losses if unreduced.
    """
    from . import tri

    call = tri.KernelCall(tuple(codes), tuple(numbers), beta, mean_rewards, reduction)
    return tri.pair_forward(policy, ref, chosen, rejected, weights, call, lengths=lengths).tensors


def _like_pairs(
    like: Tensor, pairs: int, completions: int, reduction: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = ((), (pairs,), (2, pairs), (2, pairs), (0 if reduction == "none" else completions,))
    loss, losses, rewards, slopes, grad = (like.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return loss, losses, rewards, slopes, grad


@pair_loss.register_fake
def _(policy, ref, chosen, rejected, weights, lengths, codes, numbers, beta, mean_rewards, reduction):
    return _like_pairs(policy, chosen.numel(), policy.numel(), reduction)


@torch.library.custom_op("dpo_kernels::pair_loss_backward", mutates_args=())
def pair_loss_backward(slopes: Tensor, upstream: Tensor, chosen: Tensor, rejected: Tensor, completions: int) -> Tensor:
    """dL/dpolicy [C] of unreduced losses."""
    from . import tri

    return tri.pair_backward(slopes, upstream, chosen, rejected, completions)


@pair_loss_backward.register_fake
def _(slopes, upstream, chosen, rejected, completions):
    return slopes.new_empty(completions)


def _save_pairs(ctx, inputs, output) -> None:
    policy, ref, chosen, rejected, *_, ctx.reduction = inputs
    _, _, _, slopes, grad = output
    ctx.dtypes, ctx.completions = (policy.dtype, None if ref is None else ref.dtype), policy.numel()
    ctx.save_for_backward(slopes, grad, chosen, rejected)
    ctx.mark_non_differentiable(*(output[:1] if ctx.reduction == "none" else output[1:2]), *output[2:])
    ctx.set_materialize_grads(False)


def _pair_gradient(ctx, loss, losses, *_):
    slopes, grad, chosen, rejected = ctx.saved_tensors
    if loss is None and losses is None:
        return (None,) * 11
    if ctx.reduction == "none":
        found = pair_loss_backward(slopes, losses.contiguous(), chosen, rejected, ctx.completions)
    else:
        found = grad * loss
    policy = found.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    ref = -found.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return (policy, ref, *(None,) * 9)


pair_loss.register_autograd(_pair_gradient, setup_context=_save_pairs)


@torch.library.custom_op("dpo_kernels::ranking_loss", mutates_args=())
def ranking_loss(
    policy: Tensor, ref: Tensor, rankings: Tensor, beta: float, reduction: str, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """policy, ref [C], rankings [R, K] -> `tri.RankingOutputs`. Gradient: loss, or losses if unreduced."""
    from . import tri

    return tri.ranking_forward(policy, ref, rankings, beta, reduction, top).tensors


@ranking_loss.register_fake
def _(policy, ref, rankings, beta, reduction, top):
    count, places = rankings.shape
    shapes = ((), (count,), (count, places), (count, places), (0 if reduction == "none" else policy.numel(),))
    return tuple(policy.new_empty(shape, dtype=torch.float32) for shape in shapes)


@torch.library.custom_op("dpo_kernels::ranking_loss_backward", mutates_args=())
def ranking_loss_backward(slopes: Tensor, upstream: Tensor, rankings: Tensor, completions: int) -> Tensor:
    """dL/dpolicy [C] of unreduced losses."""
    from . import tri

    return tri.ranking_backward(slopes, upstream, rankings, completions)


@ranking_loss_backward.register_fake
def _(slopes, upstream, rankings, completions):
    return slopes.new_empty(completions)


def _save_rankings(ctx, inputs, output) -> None:
    policy, ref, rankings, _, ctx.reduction, _ = inputs
    _, _, _, slopes, grad = output
    ctx.dtypes, ctx.completions = (policy.dtype, ref.dtype), policy.numel()
    ctx.save_for_backward(slopes, grad, rankings)
    ctx.mark_non_differentiable(*(output[:1] if ctx.reduction == "none" else output[1:2]), *output[2:])
    ctx.set_materialize_grads(False)


def _ranking_gradient(ctx, loss, losses, *_):
    slopes, grad, rankings = ctx.saved_tensors
    if loss is None and losses is None:
        return (None,) * 6
    if ctx.reduction == "none":
        found = ranking_loss_backward(slopes, losses.contiguous(), rankings, ctx.completions)
    else:
        found = grad * loss
    policy = found.to(ctx.dtypes[0]) if ctx.needs_input_grad[0] else None
    ref = -found.to(ctx.dtypes[1]) if ctx.needs_input_grad[1] else None
    return (policy, ref, *(None,) * 4)


ranking_loss.register_autograd(_ranking_gradient, setup_context=_save_rankings)
