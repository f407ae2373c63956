"""From logits to the preference loss in one launch, and back in one launch.

N rows, V vocabulary, C completions, T pairs. A program a row: it adds its log ratio to its completion's sum in fixed
point (`fixed.py`) and takes a ticket; whoever takes the last one of the whole batch works out pairs, rewards, loss
and dL/dlp of every completion, and leaves the workspace zeroed. Reading order: forward kernel, backward kernel,
launchers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..common import LogitOptions
from . import fixed
from . import rows as _rows
from .fixed import BAD, COUNT, SUMS, add_value, count_token, publish, scatter_pairs
from .logits import LOG2_E, log_prob, row_statistics, shaping, target_score, write_row_gradient, write_row_zeros
from .losses import KernelCall
from .pairs import (
    COMPLETION_REFERENCE,
    NO_REFERENCE,
    THREADS,
    TOKEN_REFERENCE,
    PairOutputs,
    fixed_bits,
    pair_backward,
    pass_over_pairs,
    reduction_factor,
)
from .rows import row_start


@triton.jit
def completion_of(completion_ids, row, length, PADDED: tl.constexpr):
    """The completion of a row: by its sequence in a padded batch of `length` rows each, else by its id."""
    return row // length if PADDED else tl.load(completion_ids + row).to(tl.int32)


@triton.jit
def finish(
    ref, work, chosen, rejected, weights, loss, losses, won_rewards, lost_rewards, won_slopes, lost_slopes, grad,
    T, C, bits, beta, numbers, factor,
    TERMS: tl.constexpr, REFERENCE: tl.constexpr, MIXED: tl.constexpr, LENGTHS: tl.constexpr,
    MEAN_REWARDS: tl.constexpr, WEIGHTED: tl.constexpr, REDUCED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the last program does: pairs, loss, dL/dlp, and a clean workspace."""
    lane = tl.arange(0, BLOCK)
    bad = tl.load(work + BAD, cache_modifier=".cg")
    pass_over_pairs(
        ref, ref, work, work, chosen, rejected, weights, loss, losses, won_rewards, lost_rewards, won_slopes,
        lost_slopes, T, C, beta, numbers, tl.where(bad > 0, float("nan"), factor), TERMS, True, REFERENCE, MIXED,
        LENGTHS, MEAN_REWARDS, WEIGHTED, BLOCK,
    )  # fmt: skip
    tl.debug_barrier()
    for first in range(0, 2 * C, BLOCK):
        tl.store(work + SUMS + first + lane, tl.zeros([BLOCK], tl.int64), mask=first + lane < 2 * C)
    if MIXED or LENGTHS:
        for first in range(0, 3 * C, BLOCK):
            tl.store(work + SUMS + 4 * C + first + lane, tl.zeros([BLOCK], tl.int64), mask=first + lane < 3 * C)
    if REDUCED:
        scatter_pairs(
            won_slopes, lost_slopes, losses, chosen, rejected, grad, work + SUMS + 2 * C, T, C, bits, factor, False,
            BLOCK,
        )  # fmt: skip
    tl.store(work + BAD, tl.full([], 0, tl.int64))
    tl.store(work + COUNT, tl.full([], 0, tl.int64))


@triton.jit
def fused_forward_kernel(
    logits, targets, completion_ids, ref, logps, row_max, row_inv_sum, work, chosen, rejected, weights, loss, losses,
    won_rewards, lost_rewards, won_slopes, lost_slopes, grad,
    N, V, phase, inner, outer_stride, inner_stride, length, ignore_index, inside, cap, outside, base2,
    T, C, bits, beta, numbers, factor,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    PADDED: tl.constexpr, TERMS: tl.constexpr, REFERENCE: tl.constexpr, MIXED: tl.constexpr, LENGTHS: tl.constexpr,
    MEAN_REWARDS: tl.constexpr, WEIGHTED: tl.constexpr, REDUCED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if row < N:
        target = tl.load(targets + row)
        completion = completion_of(completion_ids, row, length, PADDED)
        lp = 0.0
        m = 0.0
        inv_sum = 0.0
        if (target != ignore_index) & (completion >= 0):
            start = row_start(row, inner, outer_stride, inner_stride)
            x_t = target_score(logits + start, target, V, inside, cap, SHAPE)
            m, s, _, _, _ = row_statistics(
                logits, start, phase, V, inside, cap, base2, VEC, LANES, UNROLL, PEEL, SHAPE, 0
            )
            lp = log_prob(x_t, m, s, outside)
            inv_sum = 1.0 / s.to(tl.float32)
            value = lp.to(tl.float64)
            if REFERENCE == TOKEN_REFERENCE:
                value -= tl.load(ref + row).to(tl.float64)
                if MIXED:
                    inside_work = completion < C
                    slot = tl.where(inside_work, completion, 0)
                    add_value(work + SUMS + 4 * C, slot, inside_work, lp.to(tl.float64), C)
            if LENGTHS:
                count_token(work + SUMS + 6 * C, completion, C)
            publish(work, completion, value, C)
        tl.store(logps + row, lp)
        tl.store(row_max + row, m)
        tl.store(row_inv_sum + row, inv_sum)
    # The release half orders this program's sums, scalars of the same thread, before its ticket; the acquire half
    # orders everybody's before what the last one reads.
    ticket = tl.atomic_add(work + COUNT, tl.full([], 1, tl.int64), sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) - 1:
        finish(
            ref, work, chosen, rejected, weights, loss, losses, won_rewards, lost_rewards, won_slopes, lost_slopes,
            grad, T, C, bits, beta, numbers, factor, TERMS, REFERENCE, MIXED, LENGTHS, MEAN_REWARDS, WEIGHTED,
            REDUCED, LANES,
        )  # fmt: skip


@triton.jit
def fused_backward_kernel(
    logits, grad_logits, upstream, completion_grad, targets, completion_ids, row_max, row_inv_sum,
    V, C, phase, inner, outer_stride, inner_stride, grad_inner, grad_outer_stride, grad_inner_stride, length,
    ignore_index, inside, cap, base2, slope,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    PADDED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(targets + row)
    completion = completion_of(completion_ids, row, length, PADDED)
    grad_start = row_start(row, grad_inner, grad_outer_stride, grad_inner_stride)
    if (target != ignore_index) & (completion >= 0):
        start = row_start(row, inner, outer_stride, inner_stride)
        g = tl.load(completion_grad + completion, mask=completion < C, other=float("nan")) * slope
        if SCALED:
            g *= tl.load(upstream)
        m = tl.load(row_max + row)
        inv_sum = tl.load(row_inv_sum + row)
        write_row_gradient(
            logits, start, grad_logits, grad_start, phase, V, target, m, inv_sum, g, inside, cap, base2,
            VEC, LANES, UNROLL, PEEL, SHAPE, False,
        )  # fmt: skip
    else:
        write_row_zeros(grad_logits, grad_start, phase, V, VEC, LANES, UNROLL, PEEL)


@dataclass(frozen=True)
class FusedOutputs:
    """What the forward leaves: per row logps, maximum and 1/sum [N], and the pairs' outputs, fp32."""

    logps: torch.Tensor
    row_max: torch.Tensor
    row_inv_sum: torch.Tensor
    pairs: PairOutputs


def fused_launch(dtype: torch.dtype, vocabulary: int, device: torch.device) -> _rows.Launch:
    """The row kernels' launch, but never fewer than the threads that work on pairs."""
    launch = _rows.launch_for(dtype, vocabulary, device)
    if launch.lanes >= THREADS:
        return launch
    return _rows.Launch(launch.vec, THREADS, 1, THREADS // _rows.warp_size(device))


def _index(targets: torch.Tensor, completion_ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(targets, completion ids or a stand-in, rows a sequence of a padded batch)."""
    targets = targets.contiguous()
    if completion_ids is None:
        return targets, targets, max(1, targets.shape[-1])
    return targets, completion_ids.contiguous(), 1


def fused_forward(
    logits: torch.Tensor, targets: torch.Tensor, completion_ids: torch.Tensor | None, ref: torch.Tensor | None,
    chosen: torch.Tensor, rejected: torch.Tensor, weights: torch.Tensor | None, completions: int,
    options: LogitOptions, call: KernelCall, *, ref_per_token: bool, work: torch.Tensor | None = None,
) -> FusedOutputs:  # fmt: skip
    """logits [..., V]; targets, completion_ids [...] int64, or ids None for a padded [C, L, V] batch; chosen,
    rejected [T] int64; ref per token or per completion, or None.
    """
    logits, rows = _rows.rows_of(logits)
    pairs, vocabulary, device = chosen.numel(), logits.shape[-1], logits.device
    targets, ids, length = _index(targets, completion_ids)
    row_outputs = [torch.empty(rows.count, dtype=torch.float32, device=device) for _ in range(3)]
    out = FusedOutputs(*row_outputs, PairOutputs.allocate(logits, pairs, completions, call.reduction))
    work = fixed.workspace(device, completions) if work is None else work
    launch = fused_launch(logits.dtype, vocabulary, device)
    shape, inside, cap, outside = shaping(options)
    kind = NO_REFERENCE if ref is None else TOKEN_REFERENCE if ref_per_token else COMPLETION_REFERENCE
    fused_forward_kernel[(max(rows.count, 1),)](
        logits, targets, ids, out.logps if ref is None else ref.contiguous(), out.logps, out.row_max, out.row_inv_sum,
        work, chosen.contiguous(), rejected.contiguous(), out.logps if weights is None else weights.contiguous(),
        *out.pairs.arguments, rows.count, vocabulary, _rows.phase_of(logits), *rows.strides, length,
        options.ignore_index, inside, cap, outside, outside * LOG2_E, pairs, completions, fixed_bits(pairs), call.beta,
        call.term_numbers, reduction_factor(call.reduction, pairs),
        VEC=launch.vec, LANES=launch.lanes, UNROLL=launch.unroll, PEEL=_rows.is_peeled(logits, rows), SHAPE=shape,
        PADDED=completion_ids is None, TERMS=call.codes, REFERENCE=kind.value,
        MIXED=call.mixed and kind is TOKEN_REFERENCE,
        LENGTHS=call.lengths, MEAN_REWARDS=call.mean_rewards, WEIGHTED=weights is not None,
        REDUCED=call.reduction != "none", num_warps=launch.warps, **_rows.registers(device),
    )  # fmt: skip
    return out


def fused_backward(
    logits: torch.Tensor, targets: torch.Tensor, completion_ids: torch.Tensor | None, chosen: torch.Tensor,
    rejected: torch.Tensor, out: FusedOutputs, upstream: torch.Tensor, completions: int, options: LogitOptions,
    reduction: str, *, in_place: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dL/dlogits [..., V] from upstream = dL/dloss, fp32: a scalar, or [T] for unreduced losses (one launch more)."""
    source, rows = _rows.rows_of(logits)
    if in_place and source is not logits:
        raise ValueError("logits: an in-place gradient needs unit stride along the vocabulary, at most two row strides")
    grad = source if in_place else _rows.empty_in_phase(source, _rows.phase_of(source))
    _, grad_rows = _rows.rows_of(grad)
    completion_grad, scaled = out.pairs.grad, True
    if reduction == "none":
        completion_grad, scaled = pair_backward(out.pairs.slopes, upstream, chosen, rejected, completions), False
    targets, ids, length = _index(targets, completion_ids)
    launch = _rows.launch_for(source.dtype, source.shape[-1], source.device)
    shape, inside, cap, outside = shaping(options)
    if rows.count:
        fused_backward_kernel[(rows.count,)](
            source, grad, upstream, completion_grad, targets, ids, out.row_max, out.row_inv_sum, source.shape[-1],
            completions, _rows.phase_of(source), *rows.strides, *grad_rows.strides, length, options.ignore_index,
            inside, cap, outside * LOG2_E, options.slope, VEC=launch.vec, LANES=launch.lanes, UNROLL=launch.unroll,
            PEEL=_rows.is_peeled(source, rows) or _rows.is_peeled(grad, grad_rows), SHAPE=shape,
            PADDED=completion_ids is None, SCALED=scaled, num_warps=launch.warps,
        )  # fmt: skip
    return grad
