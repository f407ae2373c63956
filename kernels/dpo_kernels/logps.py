"""token_logps: log-probability of the target of every row of logits. Torch path: rows in cache-sized blocks.

Shapes: [...] leading dimensions, N rows in all, V vocabulary.
Order: blocks, forward, backward, public function (autograd: `operators.py`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack, overload

import torch
from torch import Tensor

from . import operators
from .backends import resolve_backend
from .common import STATS, LogitOptions, TokenStats, check_float, check_index, check_shape, check_stats
from .tiles import RowState, TileTargets, cap_derivative, fold_tile, gradient_tile, shape_tile

BLOCK_BYTES = 1 << 20
"""Of one block of rows in the accumulation dtype: it is passed over several times, so it should stay in L2."""


@dataclass(frozen=True, slots=True)
class LogpsCall:
    """The non-tensor arguments of one call."""

    options: LogitOptions
    stats: tuple[str, ...]
    dtype: torch.dtype
    """Accumulation dtype."""


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    """[..., V] as [n, V] views, one where the strides allow it (a slice logits[:, :-1] gives one per sequence)."""
    try:
        yield tensor.view(-1, tensor.shape[-1])
    except RuntimeError:
        for part in tensor.unbind(0):
            yield from _matrices(part)


def _blocks(logits: Tensor, targets: Tensor, ignore_index: int) -> Iterator[tuple[int, Tensor, slice | Tensor]]:
    """(index of the matrix, its rows' positions among all rows, which rows of it) of each block of kept rows."""
    size = max(1, BLOCK_BYTES // max(1, logits.shape[-1] * 4))
    offset = 0
    for index, matrix in enumerate(_matrices(logits)):
        stop = offset + matrix.shape[0]
        kept = (targets[offset:stop] != ignore_index).nonzero().squeeze(1)
        dense = kept.numel() == matrix.shape[0]
        for start in range(0, kept.numel(), size):
            rows = kept[start : start + size]
            yield index, rows + offset, slice(start, start + rows.numel()) if dense else rows
        offset = stop


def _shaped(matrix: Tensor, rows: slice | Tensor, call: LogpsCall) -> Tensor:
    """A private copy of the rows, in the accumulation dtype, shaped."""
    block = matrix[rows] if isinstance(rows, slice) else matrix.index_select(0, rows)
    fresh = not isinstance(rows, slice)
    return shape_tile(block.to(call.dtype, copy=not fresh), call.options)


def logps_forward(logits: Tensor, targets: Tensor, call: LogpsCall) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """logits [..., V], targets [N]: log-probs, row maximum, 1 / sum exp(x - maximum) and statistics, [N] each."""
    state = RowState.start(targets.numel(), call.dtype, logits.device, call.stats)
    for part in (state.total, state.squares):
        if part is not None:
            part.fill_(1.0)
    state.target.copy_(state.maximum)
    matrices = list(_matrices(logits))
    for index, positions, rows in _blocks(logits, targets, call.options.ignore_index):
        part = RowState.start(positions.numel(), call.dtype, logits.device, call.stats)
        x = _shaped(matrices[index], rows, call)
        fold_tile(x, part, TileTargets.locate(targets[positions], 0, x.shape[1]))
        for whole, piece in zip(state.parts(), part.parts(), strict=True):
            whole.index_copy_(0, positions, piece)
    found = state.stats(call.stats, logits.shape[-1])
    if "max_is_target" in found:
        found["max_is_target"] &= targets != call.options.ignore_index
    return state.logps(), state.maximum, state.inverse_total(), found


def logps_backward(
    logits: Tensor, targets: Tensor, logps: Tensor, maximum: Tensor, inverse: Tensor, grad: Tensor, call: LogpsCall
) -> Tensor:
    """dL/dlogits [..., V] in the logits' dtype, from grad = dL/dlogps [N]."""
    result = torch.zeros(logits.shape, dtype=logits.dtype, device=logits.device)
    matrices, outputs = list(_matrices(logits)), list(_matrices_like(result, logits))
    slope = call.options.slope
    for index, positions, rows in _blocks(logits, targets, call.options.ignore_index):
        x = _shaped(matrices[index], rows, call)
        derivative = cap_derivative(x, call.options)
        g = grad[positions] * slope
        x.sub_(maximum[positions].unsqueeze(1)).exp_()
        where = TileTargets.locate(targets[positions], 0, x.shape[1])
        gradient_tile(x, where, -g * inverse[positions], -g * logps[positions].expm1(), derivative)
        if isinstance(rows, slice):
            outputs[index][rows].copy_(x)
        else:
            outputs[index].index_copy_(0, rows, x.to(logits.dtype))
    return result


def _matrices_like(tensor: Tensor, pattern: Tensor) -> Iterator[Tensor]:
    """`tensor` (contiguous) split as `_matrices(pattern)` splits `pattern`."""
    offset, flat = 0, tensor.view(-1, tensor.shape[-1])
    for matrix in _matrices(pattern):
        yield flat[offset : offset + matrix.shape[0]]
        offset += matrix.shape[0]


class LogitArguments(TypedDict, total=False):
    """Keyword arguments of `token_logps` beside `stats`, for its overloads."""

    ignore_index: int
    temperature: float
    logit_scale: float
    softcap: float | None
    inplace_backward: bool
    backend: str | None


@overload
def token_logps(
    logits: Tensor, targets: Tensor, *, stats: tuple[()] = (), **options: Unpack[LogitArguments]
) -> Tensor: ...


@overload
def token_logps(
    logits: Tensor, targets: Tensor, *, stats: Sequence[str], **options: Unpack[LogitArguments]
) -> TokenStats: ...


def token_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    stats: Sequence[str] = (),
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor | TokenStats:
    """log softmax(x)[target] of every row, x = cap(logit_scale * logits) / temperature.

    logits [..., V] of any floating dtype and strides; targets [...] in [0, V) or `ignore_index`. Row t predicts
    targets[t]: shift beforehand. Returns [...] in fp32 (float64 for float64 logits), 0 where ignored; ignored rows are
    not read and get a gradient of 0. With `stats` (names of "entropy", "max_is_target", "mean_logit", "log_sum_sq")
    returns `TokenStats`. dL/dlogits = g * (onehot - softmax), in the logits' dtype; with `inplace_backward` (Triton
    only) it is written over the logits, whose values are lost, and a second backward raises. ValueError names a bad
    argument.
    """
    check_float("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected shape [..., V] with V >= 1, found {list(logits.shape)}")
    check_shape("targets", targets, logits.shape[:-1], "one target a row of logits")
    targets = check_index("targets", targets, logits.shape[-1], allow=ignore_index)
    options = LogitOptions(ignore_index, temperature, logit_scale, softcap)
    names = check_stats(stats)
    chosen = resolve_backend(backend, logits.device, logits.dtype)
    if inplace_backward:
        check_inplace(logits, chosen)
    mask = sum(1 << STATS.index(name) for name in set(names))
    numbers = ignore_index, options.temperature, options.logit_scale, options.softcap or 0.0
    logps, _, _, found = operators.token_logps(logits, targets.reshape(-1), *numbers, mask, inplace_backward, chosen)
    logps = logps.view(targets.shape)
    if not names:
        return logps
    rows = dict(zip((name for name in STATS if name in names), found.view(-1, *targets.shape), strict=True))
    if "max_is_target" in rows:
        rows["max_is_target"] = rows["max_is_target"] != 0
    return TokenStats(logps, **rows)


def check_inplace(logits: Tensor, backend: str) -> None:
    """Refuses what a gradient written over the logits cannot serve."""
    if backend != "triton":
        raise ValueError("inplace_backward: needs the Triton backend, found the torch one")
    if logits.is_leaf and logits.requires_grad:
        raise ValueError(
            "inplace_backward: expected logits that were computed, found a leaf, whose values would be lost"
        )
