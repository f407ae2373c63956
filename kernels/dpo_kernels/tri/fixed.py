"""Sums that do not depend on the order of their terms: int64 fixed point with atomics, and the workspace they live in.

C completions, T pairs. A floating-point atomic sum depends on which program comes first; an integer one does not.
Infinities and NaN travel beside the sum as counts. The workspace is all zero between launches: whoever reads an
accumulator last zeroes it, so that neither a launch nor the replay of a CUDA graph needs to clear it.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl

COUNT, BAD, SUMS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""Places in the workspace: programs done, rows of no existing completion, then sums [C], marks [C], gradients [C],
marks [C], and where a loss needs them, log-probs [C], marks [C], tokens [C].
"""

UP, DOWN = tl.constexpr(2.0**28), tl.constexpr(2.0**-28)
"""Scale of log-probs: |lp| < 2^20 and up to 2^15 tokens a completion stay below 2^63; rounding is 2^-29 a token."""

LARGEST = tl.constexpr(2.0**20)

_held: dict[tuple[torch.device, int], torch.Tensor] = {}


def workspace_size(completions: int) -> int:
    return 2 + 7 * completions


def workspace(device: torch.device, completions: int) -> torch.Tensor:
    """A zeroed int64 workspace for launches with that many completions.

    One a (device, stream): launches of one stream follow each other and each leaves it zeroed. Inside a CUDA graph
    capture it is allocated in the graph, which may later be replayed on any stream; an interpreter gets a new one,
    since it may be interrupted.
    """
    size = workspace_size(completions)
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int64, device=device)
    key = (device, torch.cuda.current_stream(device).cuda_stream)
    held = _held.get(key)
    if held is None or held.numel() < size:
        held = _held[key] = torch.zeros(max(1024, 2 * size), dtype=torch.int64, device=device)
    return held


@triton.jit
def round_to_int(x):
    """float64 to the nearest int64."""
    return (x + tl.where(x >= 0.0, 0.5, -0.5)).to(tl.int64)


@triton.jit
def publish(work, completion, value, C):
    """Add one row's float64 log ratio to its completion. Scalars only: they run on the thread that takes the ticket."""
    known = completion < C
    add_value(work + SUMS, tl.where(known, completion, 0), known, value, C)
    tl.atomic_add(work + BAD, tl.full([], 1, tl.int64), mask=known == 0, sem="relaxed")


@triton.jit
def add_value(sums, slot, known, value, C):
    """Add one float64 value to sums[slot]."""
    finite = tl.abs(value) < LARGEST
    steps = round_to_int(tl.where(finite, value, 0.0) * UP)
    tl.atomic_add(sums + slot, steps, mask=known & finite, sem="relaxed")
    mark = tl.full([], 1, tl.int64) << tl.where(value > 0.0, 40, tl.where(value < 0.0, 20, 0))
    tl.atomic_add(sums + C + slot, mark, mask=known & (finite == 0), sem="relaxed")


@triton.jit
def count_token(tokens, completion, C):
    """Count one row of its completion."""
    tl.atomic_add(tokens + completion, tl.full([], 1, tl.int64), mask=completion < C, sem="relaxed")


@triton.jit
def published(sums, completion, C, mask):
    """The float64 sums of completions, read past the L1 cache."""
    total = tl.load(sums + completion, mask=mask, other=0, cache_modifier=".cg").to(tl.float64) * DOWN
    marks = tl.load(sums + C + completion, mask=mask, other=0, cache_modifier=".cg")
    up, down, nan = marks >> 40, (marks >> 20) & 0xFFFFF, marks & 0xFFFFF
    infinite = tl.where(up > 0, float("inf"), float("-inf"))
    return tl.where(marks == 0, total, tl.where((nan > 0) | ((up > 0) & (down > 0)), float("nan"), infinite))


@triton.jit
def add_slopes(sums, completion, slope, up, mask, C):
    """Add slopes to their completions; returns the old values' sum, on which the reader makes itself depend."""
    finite = tl.abs(slope) < float("inf")
    steps = round_to_int(tl.where(finite, slope, 0.0).to(tl.float64) * up)
    old = tl.atomic_add(sums + completion, steps, mask=mask & finite, sem="relaxed")
    one = tl.full(steps.shape, 1, tl.int64)
    marked = tl.atomic_add(sums + C + completion, one, mask=mask & (finite == 0), sem="relaxed")
    return tl.where(mask & finite, old, 0) + tl.where(mask & (finite == 0), marked, 0)


@triton.jit
def load_slopes(slopes, upstream, item, mask, group, UPSTREAM: tl.constexpr):
    slope = tl.load(slopes + item, mask=mask, other=0.0)
    if UPSTREAM:
        slope *= tl.load(upstream + item // group, mask=mask, other=0.0)
    return slope


@triton.jit
def largest_slope(slopes, upstream, items, group, UPSTREAM: tl.constexpr, BLOCK: tl.constexpr):
    """The largest finite magnitude."""
    lane = tl.arange(0, BLOCK)
    biggest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, items, BLOCK):
        size = tl.abs(load_slopes(slopes, upstream, first + lane, first + lane < items, group, UPSTREAM))
        biggest = tl.maximum(biggest, tl.where(size < float("inf"), size, 0.0))
    return tl.max(biggest, axis=0)


@triton.jit
def fixed_scale(largest, bits):
    """A power of two, float64, that gives 2^bits terms no larger than `largest` room in 62 bits."""
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 126
    return ((1023 + 62 - bits - exponent).to(tl.int64) << 52).to(tl.float64, bitcast=True)


@triton.jit
def inverse_power(scale):
    """1 / scale for a power of two."""
    return ((2046 << 52) - scale.to(tl.int64, bitcast=True)).to(tl.float64, bitcast=True)


@triton.jit
def scatter(
    slopes, upstream, index, sums, items, C, group, up, UPSTREAM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add items' slopes to sums[index]; returns what `drain` waits for."""
    lane = tl.arange(0, BLOCK)
    seen = tl.zeros([BLOCK], tl.int64)
    for first in range(0, items, BLOCK):
        item = first + lane
        c = tl.load(index + item, mask=item < items, other=-1)
        slope = load_slopes(slopes, upstream, item, item < items, group, UPSTREAM)
        seen += add_slopes(sums, c, slope, up, (c >= 0) & (c < C), C)
    return tl.sum(seen, axis=0)


@triton.jit
def drain(sums, grad, seen, C, up, factor, BLOCK: tl.constexpr):
    """grad[c] = factor * sums[c], leaving zeros.

    Every thread's atomics have returned before their values met in `seen`. A barrier alone does not wait for them on
    AMD, so the reads are made to depend on it: the comparison is never true, which the compiler cannot know.
    """
    sums += (seen == -0x7EDCBA9876543210).to(tl.int32)
    tl.debug_barrier()
    lane = tl.arange(0, BLOCK)
    for first in range(0, C, BLOCK):
        c = first + lane
        nothing = tl.zeros([BLOCK], tl.int64)
        total = tl.atomic_and(sums + c, nothing, mask=c < C, sem="relaxed")
        marks = tl.atomic_and(sums + C + c, nothing, mask=c < C, sem="relaxed")
        value = (total.to(tl.float64) * inverse_power(up)).to(tl.float32) * factor
        tl.store(grad + c, tl.where(marks > 0, float("nan"), value), mask=c < C)


@triton.jit
def scatter_pairs(
    won_slopes, lost_slopes, upstream, chosen, rejected, grad, sums, T, C, bits, factor,
    UPSTREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad[c] = factor * sum of the slopes of c's places in pairs; one program, `sums` [2C] zero before and after."""
    largest = largest_slope(won_slopes, upstream, T, 1, UPSTREAM, BLOCK)
    largest = tl.maximum(largest, largest_slope(lost_slopes, upstream, T, 1, UPSTREAM, BLOCK))
    up = fixed_scale(largest, bits)
    seen = scatter(won_slopes, upstream, chosen, sums, T, C, 1, up, UPSTREAM, BLOCK)
    seen += scatter(lost_slopes, upstream, rejected, sums, T, C, 1, up, UPSTREAM, BLOCK)
    drain(sums, grad, seen, C, up, factor, BLOCK)


@triton.jit
def scatter_items(
    slopes, upstream, index, grad, sums, items, C, group, bits, factor, UPSTREAM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The same for one list of items, `group` of which share an upstream gradient; items of index -1 count for
    nothing.
    """
    up = fixed_scale(largest_slope(slopes, upstream, items, group, UPSTREAM, BLOCK), bits)
    seen = scatter(slopes, upstream, index, sums, items, C, group, up, UPSTREAM, BLOCK)
    drain(sums, grad, seen, C, up, factor, BLOCK)
