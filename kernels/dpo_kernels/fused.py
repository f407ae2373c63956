"""linear_dpo_loss and dpo_loss_from_logits: from hidden states or logits to the preference loss.

Shapes: N rows, V vocabulary, H hidden, C completions, T pairs.
Order: segment sums with the loss, autograd, public functions.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from . import fused_operators
from .backends import resolve_backend
from .common import LogitOptions, check_float, check_index, check_same_device, check_shape
from .head import LoraFactors, linear_token_logps
from .logps import check_inplace, token_logps
from .pairs import PairCall, check_pairs, delta_gradient, pair_terms, reduce_pairs


class LinearPairLoss(NamedTuple):
    """loss: scalar ([T] for reduction "none"); rewards [T] and token_logps (the targets' shape) are detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor


def completion_deltas(logps: Tensor, ref_logps: Tensor | None, completion_ids: Tensor, completions: int) -> Tensor:
    """[C] float64 log ratios. Per-token references are subtracted token by token, in float64, before the sum."""
    size = logps.numel()
    per_token = ref_logps is not None and ref_logps.numel() == size
    values = logps.double()
    if per_token and ref_logps is not None:
        values = values - ref_logps.double()
    # Rows of no completion go to a slot of their own, which is cut off: no data-dependent shapes.
    slots = completion_ids.where(completion_ids >= 0, completions)
    values = values.where(completion_ids >= 0, 0.0)
    delta = values.new_zeros(completions + 1).index_add_(0, slots, values)[:completions]
    return delta if per_token or ref_logps is None else delta - ref_logps.double()


class _SegmentPairLoss(torch.autograd.Function):
    """Token log-probs [N] to loss and rewards; the reference is a constant."""

    @staticmethod
    def forward(
        ctx,
        logps: Tensor,
        ref: Tensor | None,
        completion_ids: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        weights: Tensor | None,
        completions: int,
        call: PairCall,
    ):
        delta = completion_deltas(logps, ref, completion_ids, completions)
        terms = pair_terms(delta, chosen, rejected, weights, call)
        ctx.call, ctx.completions, ctx.dtype = call, completions, logps.dtype
        ctx.save_for_backward(terms.chosen_slope, terms.rejected_slope, completion_ids, chosen, rejected)
        rewards = terms.chosen_rewards.to(logps.dtype), terms.rejected_rewards.to(logps.dtype)
        ctx.mark_non_differentiable(*rewards)
        return reduce_pairs(terms.losses, call.reduction).to(logps.dtype), *rewards

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        d_won, d_lost, completion_ids, chosen, rejected = ctx.saved_tensors
        grad = delta_gradient((d_won, d_lost), chosen, rejected, grad_outputs[0], ctx.completions + 1, ctx.call)
        rows = grad[completion_ids.where(completion_ids >= 0, ctx.completions)]
        return rows.to(ctx.dtype), *(None,) * 7


def check_segments(
    rows: Tensor,
    ref_logps: Tensor | None,
    completion_ids: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    num_completions: int | None,
    pair_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """completion_ids [N], chosen and rejected [T] as int64, and C, checked against `rows` [N]."""
    size = rows.numel()
    check_shape("completion_ids", completion_ids, (size,), "one a row")
    completion_ids = check_index("completion_ids", completion_ids, None)
    if num_completions is None:
        if ref_logps is not None and ref_logps.numel() != size:
            num_completions = ref_logps.numel()
        else:
            named = [part for part in (completion_ids, chosen, rejected) if part.numel()]
            num_completions = max((int(part.max()) + 1 for part in named), default=0)
    check_index("completion_ids", completion_ids, num_completions, lower=-1)
    chosen, rejected = check_pairs(chosen, rejected, pair_weights, num_completions)
    check_same_device(rows=rows, ref_logps=ref_logps, completion_ids=completion_ids, chosen=chosen)
    if ref_logps is not None:
        _check_reference(ref_logps, completion_ids, num_completions)
    return completion_ids, chosen, rejected, num_completions


def segment_pair_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    completion_ids: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    num_completions: int | None,
    pair_weights: Tensor | None,
    call: PairCall,
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks, then loss and rewards of token log-probs [N]."""
    ids, chosen, rejected, completions = check_segments(
        logps, ref_logps, completion_ids, chosen, rejected, num_completions, pair_weights
    )
    return _SegmentPairLoss.apply(logps, ref_logps, ids, chosen, rejected, pair_weights, completions, call)


def _check_reference(ref_logps: Tensor, completion_ids: Tensor, completions: int) -> None:
    check_float("ref_logps", ref_logps)
    size = completion_ids.numel()
    if ref_logps.dim() != 1 or ref_logps.numel() not in (size, completions):
        raise ValueError(
            f"ref_logps: expected shape [{size}] (one a row) or [{completions}] (one a completion), "
            f"found {list(ref_logps.shape)}"
        )
    ambiguous = size == completions and completion_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if ambiguous and not torch.equal(completion_ids, torch.arange(size)):
        raise ValueError(
            f"ref_logps: [{size}] could be one a row or one a completion, and completion_ids are not 0, 1, 2, ...: "
            "the two readings differ"
        )


def _call(loss: str, beta: float, reduction: str, label_smoothing: float) -> PairCall:
    return PairCall.check(loss, beta, reduction, label_smoothing=label_smoothing)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    completion_ids: Tensor,
    ref_logps: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    num_completions: int | None = None,
    lora: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | str | None = None,
    backend: str | None = None,
) -> LinearPairLoss:
    """Preference loss from hidden states, through the fused LM head: what the trainer runs.

    hidden [N, H], weight [V, H], targets [N], bias, lora, process_group as `linear_token_logps`; completion_ids [N] in
    [0, C) say which completion a row belongs to (-1: none); chosen, rejected [T] index completions. ref_logps: [N] per
    token, aligned with targets (exact: log ratios are summed as lp_t - ref_t in float64, so policy = reference gives
    margins of exactly 0), or [C] per completion, or None for zero. num_completions: C, needed where not to be found by
    looking (which synchronises on a GPU). Loss options as `pair_loss`. Gradients for hidden, weight, bias and lora's
    factors. Returns `LinearPairLoss`, fp32 or float64.
    """
    call = _call(loss, beta, reduction, label_smoothing)
    logps = linear_token_logps(
        hidden,
        weight,
        targets,
        bias=bias,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        lora=lora,
        plan=plan,
        workspace_bytes=workspace_bytes,
        process_group=process_group,
        backend=backend,
    )
    check_shape("completion_ids", completion_ids, targets.shape, "as targets")
    ids = completion_ids.where(targets != ignore_index, -1)
    found = segment_pair_loss(logps, ref_logps, ids, chosen, rejected, num_completions, pair_weights, call)
    return LinearPairLoss(*found, logps.detach())


def dpo_loss_from_logits(
    logits: Tensor,
    targets: Tensor,
    completion_ids: Tensor | None,
    ref_logps: Tensor | None,
    chosen: Tensor,
    rejected: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    loss: str = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    num_completions: int | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> LinearPairLoss:
    """Preference loss from logits. Triton: one launch forward, one backward (two for reduction "none").

    logits [..., V], targets [...], row t predicts targets[t]; completion_ids [...], or None for padded [C, L, V]
    logits, where completion c is logits[c]. ref_logps [...] per token, [C] per completion, or None. The rest as
    `linear_dpo_loss`.
    """
    call = _call(loss, beta, reduction, label_smoothing)
    check_float("logits", logits)
    check_shape("targets", targets, logits.shape[:-1], "one target a row of logits")
    padded = completion_ids is None
    if completion_ids is None:
        if targets.dim() != 2:
            raise ValueError(f"completion_ids: None needs logits [C, L, V], found {list(logits.shape)}")
        completion_ids = torch.arange(targets.shape[0], device=targets.device).unsqueeze(1).expand_as(targets)
        num_completions = targets.shape[0]
    check_shape("completion_ids", completion_ids, targets.shape, "as targets")
    if ref_logps is not None and ref_logps.shape == targets.shape:
        ref_logps = ref_logps.reshape(-1)
    chosen_backend = resolve_backend(backend, logits.device, logits.dtype)
    if chosen_backend == "triton":
        options = LogitOptions(ignore_index, temperature, logit_scale, softcap)
        targets = check_index("targets", targets, logits.shape[-1], allow=ignore_index)
        if inplace_backward:
            check_inplace(logits, chosen_backend)
        ids, chosen, rejected, completions = check_segments(
            targets.reshape(-1), ref_logps, completion_ids.reshape(-1), chosen, rejected, num_completions, pair_weights
        )
        per_token = ref_logps is not None and ref_logps.numel() == targets.numel()
        outputs = fused_operators.dpo_loss_from_logits(
            *(logits, targets, None if padded else ids, ref_logps, chosen, rejected, pair_weights, completions),
            *(per_token, inplace_backward, ignore_index, options.temperature, options.logit_scale),
            *(options.softcap or 0.0, loss, beta, label_smoothing, reduction),
        )
        total, losses, (won, lost), _, _, logps, _, _ = outputs
        return LinearPairLoss(losses if reduction == "none" else total, won, lost, logps.view(targets.shape))
    logps = token_logps(
        logits,
        targets,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        inplace_backward=inplace_backward,
        backend="torch",
    )
    ids = completion_ids.where(targets != ignore_index, -1).reshape(-1)
    found = segment_pair_loss(logps.reshape(-1), ref_logps, ids, chosen, rejected, num_completions, pair_weights, call)
    return LinearPairLoss(*found, logps.detach())
