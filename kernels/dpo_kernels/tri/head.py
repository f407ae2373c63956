"""The LM head on a GPU: the vendor's GEMMs into fp32 tiles that stay in L2, Triton folds and gradients on the tiles.

N rows, n rows of a chunk, V vocabulary, v columns of a tile, H hidden. The vocabulary is the outer loop, as in the
torch path. Rows to be ignored go through the GEMMs (leaving them out would need a host synchronisation) but are not
read afterwards. Reading order: GEMMs and buffers, forward, backward.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common import LogitOptions
from ..plans import Plan
from .tiles import TileState, fold_tile, mask_of, tile_gradient

PADDING = 16
"""Elements to which a tile's leading dimension is rounded up: every row starts on a 16-byte boundary in every dtype."""


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out = a @ b, or out += a @ b, in out's fp32 from operands of any precision, without rounding in between."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif a.device.type == "cuda" and not torch.version.hip:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    elif a.device.type == "cpu":
        product(out, a.to(out.dtype), b.to(out.dtype), add=add)
    else:
        # ROCm has no out_dtype: one rounding to the operands' precision.
        out.add_(a @ b) if add else out.copy_(a @ b)


@dataclass(slots=True)
class Buffers:
    """Scratch of one pass, allocated once and reused by every tile."""

    device: torch.device
    held: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A view [rows, columns] of the buffer `name`, rows on 16-byte boundaries; its contents are arbitrary."""
        stride = -(-columns // PADDING) * PADDING
        flat = self.held.get(name)
        if flat is None or flat.numel() < rows * stride:
            flat = self.held[name] = torch.empty(rows * stride, dtype=dtype, device=self.device)
        return flat[: rows * stride].view(rows, stride)[:, :columns]

    def weight(self, weight: Tensor, compute: torch.dtype) -> Tensor:
        """Rows of the weight in the GEMMs' dtype."""
        return (
            weight
            if weight.dtype == compute
            else self.get("weight", weight.shape[0], weight.shape[1], compute).copy_(weight)
        )


@dataclass(slots=True)
class Kept:
    """What the forward leaves for the backward beside inputs and outputs."""

    state: TileState
    inverse: Tensor
    """[N] 1/sum, 0 where ignored."""
    tiles: dict[int, Tensor] = field(default_factory=dict)
    """Tile index: raw logits, fp32. Used up by the backward."""
    unit: Tensor | None = None
    """[N, H] d lp / d hidden (frozen plan)."""


def _logits(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product(out, hidden, weight.t(), add=False)
    return out if bias is None else out.add_(bias)


def head_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    plan: Plan,
    options: LogitOptions,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor], Kept]:
    """hidden [N, H] in the GEMMs' dtype, weight [V, H], bias [V], targets [N]: log-probs [N], statistics, `Kept`."""
    buffers, mask = Buffers(hidden.device), mask_of(stats)
    state = TileState.start(targets, options)
    kept = Kept(state, state.total)
    if plan.name == "frozen":
        kept.unit = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    for k, v0, v1 in plan.columns():
        w = buffers.weight(weight[v0:v1], hidden.dtype)
        b = None if bias is None else bias[v0:v1].float()
        for c, n0, n1 in plan.chunks():
            keep = plan.tile_index(k, c) < plan.retained
            shape = n1 - n0, v1 - v0
            place = Buffers(hidden.device) if keep else buffers
            z = _logits(place.get("logits", *shape, torch.float32), hidden[n0:n1], w, b)
            rows = state.rows(n0, n1)
            rescale = fold_tile(z, rows, v0, mask)
            if keep:
                kept.tiles[plan.tile_index(k, c)] = z
            if kept.unit is not None:
                tile = buffers.get("rounded", *shape, hidden.dtype)
                tile_gradient(z, tile, rows, v0, None, None)
                unit = kept.unit[n0:n1]
                if k > 0:
                    unit.mul_(rescale.unsqueeze(1))
                product(unit, tile, w, add=k > 0)
    kept.inverse = state.inverse_total()
    logps = state.logps()
    if kept.unit is not None:
        _finish_unit(kept.unit, kept, logps, weight, plan)
    return logps, state.stats(stats, weight.shape[0]), kept


def _finish_unit(unit: Tensor, kept: Kept, logps: Tensor, weight: Tensor, plan: Plan) -> None:
    """unit = sum over other tokens of e^(x - m) dz W becomes slope * ((1 - p_target) dz W_target - unit / s), in
    place.
    """
    unit.mul_((-kept.state.options.slope * kept.inverse).unsqueeze(1))
    share = -kept.state.target_slope() * logps.expm1()
    for _, start, stop in plan.chunks():
        targets = kept.state.targets[start:stop].clamp(0, weight.shape[0] - 1)
        unit[start:stop].addcmul_(share[start:stop].unsqueeze(1), weight.index_select(0, targets).float())


def head_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/dhidden [N, H] fp32, dL/dweight and dL/dbias (their dtypes) where needed, from grad = dL/dlp [N] fp32."""
    if kept.unit is not None:
        return kept.unit * grad.unsqueeze(1), None, None
    buffers, compute = Buffers(hidden.device), hidden.dtype
    grad_hidden = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device) if needs[0] else None
    grad_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if needs[1] else None
    grad_bias = torch.empty_like(bias) if needs[2] and bias is not None else None
    scaled = kept.state.options.slope * grad
    for k, v0, v1 in plan.columns():
        w = buffers.weight(weight[v0:v1], compute)
        b = None if bias is None else bias[v0:v1].float()
        summed = None
        if grad_weight is not None:
            direct = grad_weight.dtype == torch.float32
            summed = (
                grad_weight[v0:v1] if direct else buffers.get("grad_weight", v1 - v0, weight.shape[1], torch.float32)
            )
        columns = None if grad_bias is None else torch.zeros(v1 - v0, dtype=torch.float32, device=weight.device)
        for c, n0, n1 in plan.chunks():
            shape = n1 - n0, v1 - v0
            z = kept.tiles.pop(plan.tile_index(k, c), None)
            if z is None:
                z = _logits(buffers.get("logits", *shape, torch.float32), hidden[n0:n1], w, b)
            out = z if compute == torch.float32 else buffers.get("rounded", *shape, compute)
            tile = tile_gradient(z, out, kept.state.rows(n0, n1), v0, kept.inverse[n0:n1], scaled[n0:n1])
            if columns is not None:
                columns += tile.sum(0, dtype=torch.float32)
            if grad_hidden is not None:
                product(grad_hidden[n0:n1], tile, w, add=k > 0)
            if summed is not None:
                product(summed, tile.t(), hidden[n0:n1], add=c > 0)
        if grad_weight is not None and summed is not None and grad_weight.dtype != torch.float32:
            grad_weight[v0:v1].copy_(summed)
        if grad_bias is not None and columns is not None:
            grad_bias[v0:v1].copy_(columns)
    return grad_hidden, grad_weight, grad_bias
