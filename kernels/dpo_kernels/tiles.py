"""The arithmetic on a tile of logits, in torch: fold it into its rows' running statistics, turn it into a gradient.

Another backend supplies the same functions. Shapes: N rows, n rows of a tile, V vocabulary, v columns of a tile.
A row keeps its maximum m and s = sum exp(x - m) apart: with logits near 1e4 one fp32 log-sum-exp is off by 4e-4.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import LogitOptions


def shape_tile(x: Tensor, options: LogitOptions) -> Tensor:
    """Raw logits to x = cap(logit_scale * z) / temperature, in place."""
    if options.softcap is not None:
        cap = options.softcap
        return x.mul_(options.logit_scale / cap).tanh_().mul_(cap / options.temperature)
    return x if options.slope == 1.0 else x.mul_(options.slope)


def cap_derivative(x: Tensor, options: LogitOptions) -> Tensor | None:
    """(dx/dz) / slope of shaped logits: 1 - tanh^2, or None where there is no soft cap."""
    if options.softcap is None:
        return None
    return (x * (options.temperature / options.softcap)).square_().neg_().add_(1.0)


@dataclass(slots=True)
class RowState:
    """Running statistics of rows, [N] each. Sums are float64; `maximum` and `target` have the accumulation dtype."""

    maximum: Tensor
    total: Tensor
    """sum exp(x - maximum)"""
    target: Tensor
    """x of the target"""
    weighted: Tensor | None = None
    """sum exp(x - maximum) * (x - maximum), for the entropy"""
    squares: Tensor | None = None
    """sum exp(x - maximum)^2"""
    plain: Tensor | None = None
    """sum x"""

    @classmethod
    def start(cls, rows: int, dtype: torch.dtype, device: torch.device, stats: tuple[str, ...] = ()) -> "RowState":
        # The lowest finite number, not -inf: a row that has only seen -inf then folds to 0 instead of NaN.
        lowest = torch.full((rows,), torch.finfo(dtype).min, dtype=dtype, device=device)
        wide = [torch.zeros(rows, dtype=torch.float64, device=device) for _ in range(4)]
        return cls(
            maximum=lowest,
            total=wide[0],
            target=torch.full((rows,), float("-inf"), dtype=dtype, device=device),
            weighted=wide[1] if "entropy" in stats else None,
            squares=wide[2] if "log_sum_sq" in stats else None,
            plain=wide[3] if "mean_logit" in stats else None,
        )

    def rows(self, start: int, stop: int) -> "RowState":
        """Views of rows [start, stop)."""
        window = slice(start, stop)
        return RowState(
            self.maximum[window],
            self.total[window],
            self.target[window],
            None if self.weighted is None else self.weighted[window],
            None if self.squares is None else self.squares[window],
            None if self.plain is None else self.plain[window],
        )

    @property
    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        return self.maximum, self.total, self.target, self.weighted, self.squares, self.plain

    def parts(self) -> list[Tensor]:
        return [part for part in self.sums if part is not None]

    def logps(self) -> Tensor:
        """[N] log p(target). The subtraction comes first, so a confident row loses nothing to a large maximum."""
        lp = (self.target.double() - self.maximum.double()) - self.total.log()
        return lp.to(self.maximum.dtype)

    def inverse_total(self) -> Tensor:
        return self.total.reciprocal().to(self.maximum.dtype)

    def stats(self, names: tuple[str, ...], vocabulary: int | Tensor) -> dict[str, Tensor]:
        """The statistics of `TokenStats` that were asked for, [N] each."""
        found: dict[str, Tensor] = {}
        dtype = self.maximum.dtype
        if self.weighted is not None:
            found["entropy"] = (self.total.log() - self.weighted / self.total).to(dtype)
        if "max_is_target" in names:
            found["max_is_target"] = self.target >= self.maximum
        if self.plain is not None:
            found["mean_logit"] = (self.plain / vocabulary).to(dtype)
        if self.squares is not None:
            found["log_sum_sq"] = (self.squares.log() - 2 * self.total.log()).to(dtype)
        return found


@dataclass(frozen=True, slots=True)
class TileTargets:
    """Where the rows' targets lie in a tile: column [n, 1] (clamped into the tile) and whether it is inside [n, 1]."""

    column: Tensor
    inside: Tensor

    @classmethod
    def locate(cls, targets: Tensor, start: int, width: int) -> "TileTargets":
        column = (targets - start).unsqueeze(1)
        inside = (column >= 0) & (column < width)
        return cls(column.clamp_(0, width - 1), inside)

    def write(self, tile: Tensor, value: Tensor | float) -> None:
        """tile[row, target] = value [n, 1] where the target is inside."""
        tile.scatter_(1, self.column, torch.where(self.inside, value, tile.gather(1, self.column)))


def fold_tile(x: Tensor, state: RowState, where: TileTargets) -> Tensor:
    """Fold shaped logits x [n, v] into `state`; x becomes exp(x - new maximum). Returns exp(old - new maximum) [n]."""
    state.target.copy_(torch.where(where.inside, x.gather(1, where.column), state.target.unsqueeze(1)).squeeze(1))
    if state.plain is not None:
        state.plain.add_(x.sum(1, dtype=torch.float64))
    maximum = torch.maximum(x.amax(1), state.maximum)
    drop = state.maximum.double() - maximum.double()
    rescale = drop.exp()
    if state.weighted is not None:
        # sum e^(x - M) (x - M) = e^(m - M) (sum e^(x - m) (x - m) + (m - M) sum e^(x - m)); nothing folded yet: 0
        state.weighted.add_(torch.where(state.total > 0, drop * state.total, 0.0)).mul_(rescale)
    x.sub_(maximum.unsqueeze(1)).exp_()
    state.total.mul_(rescale).add_(x.sum(1))
    if state.weighted is not None:
        state.weighted.add_(torch.xlogy(x, x).sum(1))
    if state.squares is not None:
        state.squares.mul_(rescale.square()).add_(x.square().sum(1))
    state.maximum.copy_(maximum)
    return rescale.to(x.dtype)


def gradient_tile(
    x: Tensor, where: TileTargets, coefficient: Tensor, at_target: Tensor, derivative: Tensor | None
) -> None:
    """x = exp(logits - shift) [n, v] becomes dL/dz = slope * g * (onehot - p) * derivative, in place.

    coefficient [n] is -slope * g * exp(shift - m) / s; at_target [n] is slope * g * (1 - p_target), which replaces the
    target's column, so that a confident row's 1 - p is rounded once.
    """
    x.mul_(coefficient.unsqueeze(1))
    where.write(x, at_target.unsqueeze(1))
    if derivative is not None:
        x.mul_(derivative)
