"""linear_dpo_loss and dpo_loss_from_logits: from hidden states or logits to the preference loss.

Shapes: N rows, V vocabulary, H hidden, C completions, T pairs.
"""

from typing import NamedTuple, Unpack

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import fused_operators
from .backends import resolve_backend
from .calls import PairCall
from .common import LogitOptions, TokenStats, check_float, check_index, check_shape
from .head import LoraFactors, linear_token_logps
from .logps import check_inplace, token_logps
from .losses import LossOptions
from .segments import check_segments, segment_pair_loss


class LinearPairLoss(NamedTuple):
    """loss: scalar ([T] for reduction "none"); rewards [T] and token_logps (the targets' shape) are detached."""

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    token_logps: Tensor


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
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    num_completions: int | None = None,
    lora: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | str | None = None,
    backend: str | None = None,
    **options: Unpack[LossOptions],
) -> LinearPairLoss:
    """Preference loss from hidden states, through the fused LM head: what the trainer runs.

    hidden [N, H], weight [V, H], targets [N], bias, lora, process_group as `linear_token_logps`; completion_ids [N] in
    [0, C) say which completion a row belongs to (-1: none); chosen, rejected [T] index completions. ref_logps: [N] per
    token, aligned with targets (exact: log ratios are summed as lp_t - ref_t in float64, so policy = reference gives
    margins of exactly 0), or [C] per completion, or None for zero. num_completions: C, needed where not to be found by
    looking (which synchronises on a GPU). Losses and options as `pair_loss`, and also `ld_alpha` (the rows of a
    completion in order, ref_logps per token) and `wpo` (weights from the same pass). Gradients for hidden, weight, bias
    and lora's factors. Returns `LinearPairLoss`, fp32 or float64.
    """
    call = PairCall.check(loss, beta, reduction, **options)
    found = linear_token_logps(
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
        stats=("log_sum_sq",) if call.wpo else (),
        backend=backend,
    )
    logps, log_sum_sq = _with_statistic(found)
    check_shape("completion_ids", completion_ids, targets.shape, "as targets")
    ids = completion_ids.where(targets != ignore_index, -1)
    pairs = segment_pair_loss(logps, ref_logps, ids, chosen, rejected, num_completions, pair_weights, log_sum_sq, call)
    return LinearPairLoss(*pairs, logps.detach())


def _with_statistic(found: Tensor | TokenStats) -> tuple[Tensor, Tensor | None]:
    return (found.logps, found.log_sum_sq) if isinstance(found, TokenStats) else (found, None)


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
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    num_completions: int | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
    **options: Unpack[LossOptions],
) -> LinearPairLoss:
    """Preference loss from logits. Triton: one launch forward, one backward (two for reduction "none"); for losses that
    sort the batch, `ld_alpha` and `wpo` one launch each way for the log-probs, and torch on one number a row.

    logits [..., V], targets [...], row t predicts targets[t]; completion_ids [...], or None for padded [C, L, V]
    logits, where completion c is logits[c]. ref_logps [...] per token, [C] per completion, or None. The rest as
    `linear_dpo_loss`.
    """
    call = PairCall.check(loss, beta, reduction, **options)
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
    if chosen_backend == "triton" and call.in_kernel and not call.rows:
        shape = LogitOptions(ignore_index, temperature, logit_scale, softcap)
        targets = check_index("targets", targets, logits.shape[-1], allow=ignore_index)
        if inplace_backward:
            check_inplace(logits, chosen_backend)
        ids, chosen, rejected, completions = check_segments(
            *(targets.reshape(-1), ref_logps, completion_ids.reshape(-1), chosen, rejected),
            *(num_completions, pair_weights, call),
        )
        per_token = ref_logps is not None and ref_logps.numel() == targets.numel()
        outputs = fused_operators.dpo_loss_from_logits(
            *(logits, targets, None if padded else ids, ref_logps, chosen, rejected, pair_weights, completions),
            *(per_token, inplace_backward, ignore_index, shape.temperature, shape.logit_scale, shape.softcap or 0.0),
            *(call.codes, call.numbers, beta, call.mean_rewards, reduction),
        )
        total, losses, (won, lost), _, _, logps, _, _ = outputs
        return LinearPairLoss(losses if reduction == "none" else total, won, lost, logps.view(targets.shape))
    found = token_logps(
        logits,
        targets,
        ignore_index=ignore_index,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        stats=("log_sum_sq",) if call.wpo else (),
        inplace_backward=inplace_backward,
        backend=chosen_backend,
    )
    logps, log_sum_sq = _with_statistic(found)
    ids = completion_ids.where(targets != ignore_index, -1).reshape(-1)
    pairs = segment_pair_loss(
        *(logps.reshape(-1), ref_logps, ids, chosen, rejected, num_completions, pair_weights),
        *(None if log_sum_sq is None else log_sum_sq.reshape(-1), call),
    )
    return LinearPairLoss(*pairs, logps.detach())
