"""Folding tiles of logits into their rows' running statistics, and turning them into gradients.

N rows, n rows of a tile, V vocabulary, v columns of a tile. A tile [n, v] is what a GEMM left, fp32, its rows on
16-byte boundaries. Running statistics are those of `logits.py`, one place a row. Reading order: fold kernel, gradient
kernel, state, launchers.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import sharding
from ..common import STATS, LogitOptions
from . import rows as _rows
from . import tune
from .logits import LOG2_E, LOWEST, row_statistics, shaping, target_score, write_row_gradient, write_row_zeros


@triton.jit
def rescaled(value, s, m, new, base2):
    """sum e * (x - m) made relative to a new maximum."""
    return (value + s * tl.where(s > 0.0, m - new, 0.0)) * tl.exp2((m - new) * base2)


@triton.jit
def fold_kernel(
    tile, targets, maximum, total, target, weighted, squares, plain, rescale, v0, v, stride, ignore_index,
    inside, cap, base2,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    goal = tl.load(targets + row)
    factor = 1.0
    if goal != ignore_index:
        start = row.to(tl.int64) * stride
        if (goal >= v0) & (goal < v0 + v):
            tl.store(target + row, target_score(tile + start, goal - v0, v, inside, cap, SHAPE))
        m, total_e, sx, ss, sum_x = row_statistics(
            tile, start, 0, v, inside, cap, base2, VEC, LANES, UNROLL, PEEL, SHAPE, STATS
        )
        s = total_e.to(tl.float32)
        old = tl.load(maximum + row)
        old_total = tl.load(total + row)
        old_sum = old_total.to(tl.float32)
        new = tl.maximum(old, m)
        factor = tl.exp2((old - new) * base2)
        grown = tl.exp2((m - new) * base2)
        tl.store(maximum + row, new)
        tl.store(total + row, old_total * factor + total_e * grown)
        if STATS & 1:
            kept = rescaled(tl.load(weighted + row), old_sum, old, new, base2)
            tl.store(weighted + row, kept + rescaled(sx, s, m, new, base2))
        if STATS & 4:
            tl.store(plain + row, tl.load(plain + row) + sum_x)
        if STATS & 8:
            tl.store(squares + row, tl.load(squares + row) * factor * factor + ss * grown * grown)
    tl.store(rescale + row, factor)


@triton.jit
def tile_gradient_kernel(
    tile, out, targets, maximum, scale, grad, v0, v, stride, out_stride, ignore_index, inside, cap, base2,
    VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr, PEEL: tl.constexpr, SHAPE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """out = grad * (onehot - e^(x - maximum) * scale) * dscore/dz; UNIT: e^(x - maximum) * dscore/dz without the
    target.
    """
    row = tl.program_id(0)
    goal = tl.load(targets + row)
    start, out_start = row.to(tl.int64) * stride, row.to(tl.int64) * out_stride
    if goal != ignore_index:
        column = tl.where((goal >= v0) & (goal < v0 + v), goal - v0, -1)
        m = tl.load(maximum + row)
        if UNIT:
            write_row_gradient(
                tile, start, out, out_start, 0, v, column, m, 1.0, -1.0, inside, cap, base2,
                VEC, LANES, UNROLL, PEEL, SHAPE, True,
            )  # fmt: skip
        else:
            write_row_gradient(
                tile, start, out, out_start, 0, v, column, m, tl.load(scale + row), tl.load(grad + row), inside, cap,
                base2, VEC, LANES, UNROLL, PEEL, SHAPE, False,
            )  # fmt: skip
    else:
        write_row_zeros(out, out_start, 0, v, VEC, LANES, UNROLL, PEEL)


@dataclass(frozen=True)
class TileState:
    """Running statistics of rows, [N] fp32 each, total float64; maximum and target are scores before the factor outside
    the soft-cap.
    """

    options: LogitOptions
    targets: torch.Tensor
    maximum: torch.Tensor
    total: torch.Tensor
    target: torch.Tensor
    weighted: torch.Tensor
    squares: torch.Tensor
    plain: torch.Tensor

    @classmethod
    def start(cls, targets: torch.Tensor, options: LogitOptions, maximum: torch.Tensor | None = None) -> "TileState":
        """Nothing folded yet; or, for gradients, which need no more, the rows' whole maximum."""
        parts = torch.zeros(5, targets.numel(), dtype=torch.float32, device=targets.device)
        parts[0], parts[1] = LOWEST.value if maximum is None else maximum, float("nan")
        whole, target, weighted, squares, plain = parts.unbind()
        total = torch.zeros(targets.numel(), dtype=torch.float64, device=targets.device)
        return cls(options, targets, whole, total, target, weighted, squares, plain)

    def rows(self, start: int, stop: int) -> "TileState":
        """Views of rows [start, stop)."""
        parts = self.targets, self.maximum, self.total, self.target, self.weighted, self.squares, self.plain
        return TileState(self.options, *(part[start:stop] for part in parts))

    def merge(self, shard: sharding.Shard, group: str) -> torch.Tensor:
        """Make these the statistics of the whole vocabulary; returns e^(shard's maximum - whole maximum) [N]."""
        mine = (self.targets != shard.elsewhere) & (self.targets != self.options.ignore_index)
        self.target.copy_(torch.where(mine, self.target, float("-inf")))
        local = self.maximum, self.total, self.target, self.weighted, self.squares, self.plain
        whole, scale = sharding.merge(sharding.RowSums(*local), shaping(self.options)[3], group)
        for part, merged in zip(local, whole, strict=True):
            part.copy_(merged)
        return scale.float()

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        """[N] fp32, 0 where ignored."""
        return torch.where(self.targets != self.options.ignore_index, values.float(), 0.0)

    def logps(self) -> torch.Tensor:
        """[N] log p(target), 0 where ignored."""
        outside = shaping(self.options)[3]
        return self._kept((self.target.double() - self.maximum.double()) * outside - self.total.log())

    def inverse_total(self) -> torch.Tensor:
        return self._kept(self.total.reciprocal())

    def target_slope(self) -> torch.Tensor:
        """[N] dx/dz of the target."""
        slope = self.options.slope
        if self.options.softcap is None:
            return self._kept(torch.full_like(self.target, slope))
        return self._kept(slope * (1.0 - (self.target / self.options.softcap).square()))

    def stats(self, names: tuple[str, ...], vocabulary: int | torch.Tensor) -> dict[str, torch.Tensor]:
        """The statistics of `TokenStats` that were asked for, [N] each."""
        outside = shaping(self.options)[3]
        found = {
            "entropy": lambda: self._kept(self.total.log() - self.weighted / self.total * outside),
            "max_is_target": lambda: self._kept((self.target >= self.maximum).float()) != 0,
            "mean_logit": lambda: self._kept(self.plain / vocabulary * outside),
            "log_sum_sq": lambda: self._kept(self.squares.log() - 2 * self.total.log()),
        }
        return {name: found[name]() for name in names}


def mask_of(names: tuple[str, ...]) -> int:
    return sum(1 << STATS.index(name) for name in set(names))


def fold_tile(tile: torch.Tensor, state: TileState, v0: int, stats: int) -> torch.Tensor:
    """Fold columns v0 on, raw logits [n, v], into the rows' state; returns e^(old - new maximum) [n]."""
    rescale = torch.empty(tile.shape[0], dtype=torch.float32, device=tile.device)
    launch = tune.launch_for("fold", tile.dtype, tile.shape[1], tile.device)
    shape, inside, cap, outside = shaping(state.options)
    fold_kernel[(tile.shape[0],)](
        tile, state.targets, state.maximum, state.total, state.target, state.weighted, state.squares, state.plain,
        rescale, v0, tile.shape[1], tile.stride(0), state.options.ignore_index, inside, cap, outside * LOG2_E,
        VEC=launch.vec, LANES=launch.lanes, UNROLL=launch.unroll, PEEL=_is_peeled(tile), SHAPE=shape, STATS=stats,
        num_warps=launch.warps,
    )  # fmt: skip
    return rescale


def _is_peeled(*tensors: torch.Tensor) -> bool:
    return any(_rows.is_peeled(t, _rows.Rows(t.shape[0], t.shape[0], 0, t.stride(0))) for t in tensors)


def tile_gradient(
    tile: torch.Tensor, out: torch.Tensor, state: TileState, v0: int, inverse: torch.Tensor | None,
    grad: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """out [n, v] = dL/dz of a tile of raw logits z, in out's dtype; out may be the tile.

    inverse = 1/sum [n] and grad = dL/dlp * slope [n]; without them e^(x - maximum) * dscore/dz except at the target, 0.
    """
    shape, inside, cap, outside = shaping(state.options)
    # One 16-byte word of the narrower type; the wider one takes two.
    narrow = min(tile.dtype, out.dtype, key=lambda d: d.itemsize)
    launch = tune.launch_for("gradient", narrow, tile.shape[1], tile.device)
    words = launch.vec * tile.dtype.itemsize // _rows.WORD
    tile_gradient_kernel[(tile.shape[0],)](
        tile, out, state.targets, state.maximum, state.maximum if inverse is None else inverse,
        state.maximum if grad is None else grad, v0, tile.shape[1], tile.stride(0), out.stride(0),
        state.options.ignore_index, inside, cap, outside * LOG2_E, VEC=launch.vec, LANES=launch.lanes,
        UNROLL=max(1, launch.unroll // words), PEEL=_is_peeled(out) or tile.stride(0) % launch.vec != 0, SHAPE=shape,
        UNIT=inverse is None, num_warps=launch.warps,
    )  # fmt: skip
    return out
