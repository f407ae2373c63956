"""Log-probability of the target of every row of logits: one read forward, one read and one write backward.

N rows, V vocabulary. z = softcap(logit_scale * x) / temperature, lp = z_target - logsumexp(z). The forward keeps, per
row, the maximum and the reciprocal of the sum, both fp32, from which the backward restores probabilities: with logits
near 1e4 a saved fp32 log-sum-exp would be off by 2e-4 in the largest probability. Reading order: helpers, forward,
backward, launchers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

from ..common import LogitOptions
from . import rows as _rows
from . import tune
from .rows import block_columns, peeled_columns, row_start, split_row

# Statistics are a bit mask in the order of `common.STATS`: 1 entropy, 2 max_is_target, 4 mean_logit, 8 log_sum_sq.
PLAIN, CAPPED, NEGATED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITY = tl.constexpr(float("inf"))
LOG2_E = 1.4426950408889634


def shaping(options: LogitOptions) -> tuple[int, float, float, float]:
    """(shape, inside, cap, outside): x = outside * cap * tanh(inside * z) when capped, else outside * (z or -z).

    The kernels look for the largest score before multiplying by `outside`, which is therefore never negative.
    """
    if options.softcap is not None:
        return CAPPED.value, options.logit_scale / options.softcap, options.softcap, 1.0 / options.temperature
    return (NEGATED if options.slope < 0 else PLAIN).value, 1.0, 1.0, abs(options.slope)


@triton.jit
def tanh(u):
    """tanh with small relative error: a series near 0, where 1 - 2 / (1 + e^2u) cancels."""
    square = u * u
    series = ((62.0 / 2835.0 * square - 17.0 / 315.0) * square + 2.0 / 15.0) * square - 1.0 / 3.0
    return tl.where(tl.abs(u) < 0.3, u + u * square * series, 1.0 - 2.0 / (1.0 + tl.exp2(u * 2.8853900817779268)))


@triton.jit
def shaped(z, inside, cap, SHAPE: tl.constexpr):
    """The score of a logit before the factor outside, in fp32."""
    score = z.to(tl.float32)
    if SHAPE == CAPPED:
        score = cap * tanh(score * inside)
    elif SHAPE == NEGATED:
        score = -score
    return score


@triton.jit
def peel_state(
    row_ptr, head, body, V, inside, cap, base2, VEC: tl.constexpr, LANES: tl.constexpr, SHAPE: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """Running statistics (max, sum, sum e*x, sum e*e, sum x) per lane after the row's head and tail, an element a
    lane at most.
    """
    cols, valid = peeled_columns(head, body, V, VEC, LANES)
    x = shaped(tl.load(row_ptr + cols, mask=valid, other=-INFINITY), inside, cap, SHAPE)
    x = x if SHAPE == PLAIN else tl.where(valid, x, -INFINITY)
    m = tl.maximum(x, LOWEST)
    e = tl.where(valid, tl.exp2((x - m) * base2), 0.0)
    zero = tl.zeros_like(m)
    return m, e, zero, e * e, tl.where(valid, x, 0.0) if STATS & 4 else zero


@triton.jit
def fold_block(m, s, sx, ss, total, x, valid, base2, STATS: tl.constexpr):
    """Fold a block [UNROLL, LANES, VEC] into each lane's running statistics [LANES]; masked elements of x are -inf.

    sx is the sum of e * (x - m), relative to the running maximum, so that the entropy does not cancel.
    """
    new = tl.maximum(m, tl.max(tl.max(x, axis=2), axis=0))
    rescale = tl.exp2((m - new) * base2)
    shifted = x - new[None, :, None]
    e = tl.exp2(shifted * base2)
    if STATS & 1:
        weighted = tl.where(shifted > LOWEST, e * shifted, 0.0)
        sx = (sx + s * tl.where(s > 0.0, m - new, 0.0)) * rescale + tl.sum(tl.sum(weighted, axis=2), axis=0)
    if STATS & 4:
        total += tl.sum(tl.sum(tl.where(valid, x, 0.0), axis=2), axis=0)
    if STATS & 8:
        ss = ss * rescale * rescale + tl.sum(tl.sum(e * e, axis=2), axis=0)
    return new, s * rescale + tl.sum(tl.sum(e, axis=2), axis=0), sx, ss, total


@triton.jit
def row_statistics(
    logits, start, phase, V, inside, cap, base2,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """(max, float64 sum, sum e*(x - max), sum e*e, sum x) of one row: each thread keeps its own until the end, no
    barrier in the loop.
    """
    body_ptr, head, body = split_row(logits, start, phase, V, VEC, PEEL)
    if PEEL:
        m, s, sx, ss, total = peel_state(logits + start, head, body, V, inside, cap, base2, VEC, LANES, SHAPE, STATS)
    else:
        s = tl.zeros([LANES], tl.float32)
        m, sx, ss, total = s + LOWEST, s, s, s
    block = block_columns(VEC, LANES, UNROLL)
    for first in range(0, body, LANES * UNROLL * VEC):
        cols = first + block
        valid = cols < body
        x = shaped(tl.load(body_ptr + cols, mask=valid, other=-INFINITY), inside, cap, SHAPE)
        x = x if SHAPE == PLAIN else tl.where(valid, x, -INFINITY)
        m, s, sx, ss, total = fold_block(m, s, sx, ss, total, x, valid, base2, STATS)
    row_m = tl.max(m, axis=0)
    rescale = tl.exp2((m - row_m) * base2)
    row_s = tl.sum((s * rescale).to(tl.float64), axis=0)
    if STATS & 1:
        sx = tl.sum((sx + s * tl.where(s > 0.0, m - row_m, 0.0)) * rescale, axis=0)
    if STATS & 8:
        ss = tl.sum(ss * rescale * rescale, axis=0)
    if STATS & 4:
        total = tl.sum(total, axis=0)
    return row_m, row_s, sx, ss, total


@triton.jit
def log_prob(x_t, m, s, outside):
    """The target's log-prob from its score, the row's maximum and its float64 sum, in fp32.

    The subtraction comes first, so a large maximum costs nothing; what fp32 drops of the sum is half a unit of a
    confident row's log-prob, and comes back as a term of its own.
    """
    near = s.to(tl.float32)
    rest = (s - near).to(tl.float32)
    return (x_t - m) * outside - (tl.log(near) + rest / near)


@triton.jit
def store_statistics(slot, N, V, x_t, m, s, sx, ss, total, outside, STATS: tl.constexpr):
    """Write one row's statistics in the mask, N apart."""
    if STATS & 1:
        tl.store(slot, tl.log(s) - sx / s * outside)
        slot += N
    if STATS & 2:
        tl.store(slot, tl.where(x_t == m, 1.0, 0.0))
        slot += N
    if STATS & 4:
        tl.store(slot, total / V * outside)
        slot += N
    if STATS & 8:
        tl.store(slot, tl.log(ss) - 2.0 * tl.log(s))


@triton.jit
def target_score(row_ptr, target, V, inside, cap, SHAPE: tl.constexpr):
    """The target's capped logit; a target outside the vocabulary reads nothing and gives NaN."""
    known = (target >= 0) & (target < V)
    return shaped(tl.load(row_ptr + target, mask=known, other=float("nan")), inside, cap, SHAPE)


@triton.jit
def logps_forward_kernel(
    logits, targets, logps, row_max, row_inv_sum, stats, N, V, phase, inner, outer_stride, inner_stride, ignore_index,
    inside, cap, outside, base2,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(targets + row)
    lp = 0.0
    m = 0.0
    inv_sum = 0.0
    if target != ignore_index:
        start = row_start(row, inner, outer_stride, inner_stride)
        x_t = target_score(logits + start, target, V, inside, cap, SHAPE)
        m, total_e, sx, ss, total = row_statistics(
            logits, start, phase, V, inside, cap, base2, VEC, LANES, UNROLL, PEEL, SHAPE, STATS
        )
        lp = log_prob(x_t, m, total_e, outside)
        s = total_e.to(tl.float32)
        inv_sum = 1.0 / s
        store_statistics(stats + row, N, V, x_t, m, s, sx, ss, total, outside, STATS)
    else:
        for _ in tl.static_range((STATS & 1) + (STATS >> 1 & 1) + (STATS >> 2 & 1) + (STATS >> 3)):
            tl.store(stats + row, 0.0)
            stats += N
    tl.store(logps + row, lp)
    tl.store(row_max + row, m)
    tl.store(row_inv_sum + row, inv_sum)


@triton.jit
def logit_gradient(x, cols, target, m, inv_sum, g, inside, cap, base2, SHAPE: tl.constexpr, DROP: tl.constexpr):
    """g * (onehot - p) * dz/dx; g already holds the factor outside the cap (and the scale inside it). DROP: 0 at the
    target.
    """
    score = x.to(tl.float32)
    if SHAPE == NEGATED:
        score = -score
    if SHAPE == CAPPED:
        t = tanh(score * inside)
        score = cap * t
        g = g * (1.0 - t * t)
    p = tl.exp2((score - m) * base2) * inv_sum
    return tl.where(cols == target, 0.0, -p) * g if DROP else (tl.where(cols == target, 1.0, 0.0) - p) * g


@triton.jit
def write_row_gradient(
    logits, start, grad_logits, grad_start, phase, V, target, m, inv_sum, g, inside, cap, base2,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    DROP: tl.constexpr,
):  # fmt: skip
    """One row of dL/dlogits; it may lie over the logits' row, and must begin at the same address modulo 16."""
    body_ptr, head, body = split_row(logits, start, phase, V, VEC, PEEL)
    grad_body_ptr, _, _ = split_row(grad_logits, grad_start, phase, V, VEC, PEEL)
    out_type = grad_logits.dtype.element_ty
    target = target.to(tl.int32)
    in_body = target - head
    block = block_columns(VEC, LANES, UNROLL)
    for first in range(0, body, LANES * UNROLL * VEC):
        cols = first + block
        x = tl.load(body_ptr + cols, mask=cols < body, other=0.0)
        dx = logit_gradient(x, cols, in_body, m, inv_sum, g, inside, cap, base2, SHAPE, DROP)
        tl.store(grad_body_ptr + cols, dx.to(out_type), mask=cols < body)
    if PEEL:
        edge, valid = peeled_columns(head, body, V, VEC, LANES)
        x_edge = tl.load(logits + start + edge, mask=valid, other=0.0)
        dx_edge = logit_gradient(x_edge, edge, target, m, inv_sum, g, inside, cap, base2, SHAPE, DROP)
        tl.store(grad_logits + grad_start + edge, dx_edge.to(out_type), mask=valid)


@triton.jit
def write_row_zeros(
    grad_logits, start, phase, V, VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr
):  # fmt: skip
    """Zeros for the gradient of an ignored row, whose logits are never read."""
    body_ptr, head, body = split_row(grad_logits, start, phase, V, VEC, PEEL)
    out_type = grad_logits.dtype.element_ty
    block = block_columns(VEC, LANES, UNROLL)
    zeros = tl.zeros([UNROLL, LANES, VEC], out_type)
    for first in range(0, body, LANES * UNROLL * VEC):
        cols = first + block
        tl.store(body_ptr + cols, zeros, mask=cols < body)
    if PEEL:
        edge, valid = peeled_columns(head, body, V, VEC, LANES)
        tl.store(grad_logits + start + edge, tl.zeros([LANES], out_type), mask=valid)


@triton.jit
def logps_backward_kernel(
    logits, grad_logits, grad_logps, targets, row_max, row_inv_sum, V, phase, inner, outer_stride, inner_stride,
    grad_inner, grad_outer_stride, grad_inner_stride, ignore_index, inside, cap, base2, slope,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    target = tl.load(targets + row)
    grad_start = row_start(row, grad_inner, grad_outer_stride, grad_inner_stride)
    if target != ignore_index:
        start = row_start(row, inner, outer_stride, inner_stride)
        g = tl.load(grad_logps + row) * slope
        m = tl.load(row_max + row)
        inv_sum = tl.load(row_inv_sum + row)
        write_row_gradient(
            logits, start, grad_logits, grad_start, phase, V, target, m, inv_sum, g, inside, cap, base2,
            VEC, LANES, UNROLL, PEEL, SHAPE, False,
        )  # fmt: skip
    else:
        write_row_zeros(grad_logits, grad_start, phase, V, VEC, LANES, UNROLL, PEEL)


def logps_forward(
    logits: torch.Tensor, targets: torch.Tensor, options: LogitOptions, stats: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """logits [..., V] fp32, fp16 or bf16, targets [...] int64 -> logps, max, 1/sum, each [N], and stats [count, N],
    fp32.
    """
    logits, rows = _rows.rows_of(logits)
    vocabulary = logits.shape[-1]
    outputs = [torch.empty(rows.count, dtype=torch.float32, device=logits.device) for _ in range(3)]
    statistics = torch.empty(stats.bit_count(), rows.count, dtype=torch.float32, device=logits.device)
    launch = tune.launch_for("forward", logits.dtype, vocabulary, logits.device)
    shape, inside, cap, outside = shaping(options)
    if rows.count:
        logps_forward_kernel[(rows.count,)](
            logits, targets.contiguous(), *outputs, statistics, rows.count, vocabulary,
            _rows.phase_of(logits), *rows.strides, options.ignore_index, inside, cap, outside, outside * LOG2_E,
            VEC=launch.vec, LANES=launch.lanes, UNROLL=launch.unroll, PEEL=_rows.is_peeled(logits, rows),
            SHAPE=shape, STATS=stats, num_warps=launch.warps,
        )  # fmt: skip
    logps, row_max, row_inv_sum = outputs
    return logps, row_max, row_inv_sum, statistics


def logps_backward(
    logits: torch.Tensor, targets: torch.Tensor, row_max: torch.Tensor, row_inv_sum: torch.Tensor,
    grad_logps: torch.Tensor, options: LogitOptions, *, in_place: bool = False,
) -> torch.Tensor:  # fmt: skip
    """dL/dlogits [..., V] in the logits' dtype, from grad_logps [N] fp32; in_place writes it over the logits."""
    source, rows = _rows.rows_of(logits)
    if in_place and source is not logits:
        raise ValueError(
            "logits: an in-place gradient needs unit stride along the vocabulary and at most two row strides"
        )
    grad = source if in_place else _rows.empty_in_phase(source, _rows.phase_of(source))
    _, grad_rows = _rows.rows_of(grad)
    vocabulary = source.shape[-1]
    launch = tune.launch_for("backward", source.dtype, vocabulary, source.device)
    shape, inside, cap, outside = shaping(options)
    if rows.count:
        logps_backward_kernel[(rows.count,)](
            source, grad, grad_logps.contiguous(), targets.contiguous(), row_max, row_inv_sum, vocabulary,
            _rows.phase_of(source), *rows.strides, *grad_rows.strides, options.ignore_index, inside, cap,
            outside * LOG2_E, options.slope, VEC=launch.vec, LANES=launch.lanes, UNROLL=launch.unroll,
            PEEL=_rows.is_peeled(source, rows) or _rows.is_peeled(grad, grad_rows), SHAPE=shape,
            num_warps=launch.warps,
        )  # fmt: skip
    return grad
