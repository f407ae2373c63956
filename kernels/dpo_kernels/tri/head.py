"""The LM head on a GPU: the vendor's GEMMs into fp32 tiles that stay in L2, Triton folds and gradients on the tiles.

N rows, n rows of a chunk, V vocabulary, v columns of a tile, H hidden, r rank of LoRA factors. The vocabulary is the
outer loop, as in the torch path. Rows to be ignored go through the GEMMs (leaving them out would need a host
synchronisation) but are not read afterwards. Reading order: GEMMs, forward, backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import sharding
from ..head_torch import Gradients
from ..storage import Buffers, HeadCall, Kept, Operands
from .tiles import TileState, fold_tile, mask_of, tile_gradient


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


@dataclass(frozen=True, slots=True)
class Columns:
    """A tile of the head, weight and LoRA factor in the GEMMs' dtype."""

    weight: Tensor
    """[v, H]"""
    factor: Tensor | None
    """[v, r]"""
    bias: Tensor | None
    """[v] fp32"""

    @classmethod
    def take(cls, x: Operands, start: int, stop: int, buffers: Buffers) -> "Columns":
        compute = x.hidden.dtype
        weight = buffers.cast("weight", x.weight[start:stop], compute)
        factor = None if x.factor is None else buffers.cast("factor", x.factor[start:stop], compute)
        return cls(weight, factor, None if x.bias is None else x.bias[start:stop].float())

    def logits(self, out: Tensor, x: Operands, rows: slice) -> Tensor:
        product(out, x.hidden[rows], self.weight.t(), add=False)
        if x.low is not None and self.factor is not None:
            product(out, x.low[rows], self.factor.t(), add=True)
        return out if self.bias is None else out.add_(self.bias)


def head_forward(
    x: Operands, shard: sharding.Shard, call: HeadCall, kept: Kept
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """log-probs [N] and statistics; fills `kept` but for its two vectors, which it returns too."""
    plan, buffers, mask = kept.plan, Buffers(x.hidden.device), mask_of(call.stats)
    state, frozen = TileState.start(x.targets, call.options), kept.plan.name == "frozen"
    for k, v0, v1 in plan.columns():
        head = Columns.take(x, v0, v1, buffers)
        for c, n0, n1 in plan.chunks():
            chunk, shape = slice(n0, n1), (n1 - n0, v1 - v0)
            keep = kept.keeps(k, c)
            tile = kept.tile(k, c, *shape, padded=True) if keep else buffers.padded("logits", *shape, torch.float32)
            z = head.logits(tile, x, chunk)
            rows = state.rows(n0, n1)
            rescale = fold_tile(z, rows, v0, mask)
            if frozen:
                tile = tile_gradient(z, buffers.padded("rounded", *shape, call.compute), rows, v0, None, None)
                for unit, other in ((kept.unit, head.weight), (kept.unit_low, head.factor)):
                    if other is not None:
                        if k > 0:
                            unit[chunk].mul_(rescale.unsqueeze(1))
                        product(unit[chunk], tile, other, add=k > 0)
    scale = state.merge(shard, call.group) if call.group else None
    inverse, logps = state.inverse_total(), state.logps()
    if frozen:
        _finish_units(kept, x, state, inverse, logps, scale, shard)
    return logps, state.stats(call.stats, shard.vocabulary), state.maximum, inverse


def _finish_units(
    kept: Kept,
    x: Operands,
    state: TileState,
    inverse: Tensor,
    logps: Tensor,
    scale: Tensor | None,
    shard: sharding.Shard,
) -> None:
    """unit = sum over other tokens of e^(x - m) dz W becomes slope * ((1 - p_target) dz W_target - unit / s), in
    place.
    """
    share = -state.target_slope() * logps.expm1()
    if shard.elsewhere is not None:
        share = share.where(x.targets != shard.elsewhere, 0.0)
    others = -state.options.slope * (inverse if scale is None else inverse * scale)
    for unit, head in ((kept.unit, x.weight), (kept.unit_low, x.factor)):
        if head is None:
            continue
        unit.mul_(others.unsqueeze(1))
        for _, start, stop in kept.plan.chunks():
            targets = x.targets[start:stop].clamp(0, head.shape[0] - 1)
            unit[start:stop].addcmul_(share[start:stop].unsqueeze(1), head.index_select(0, targets).float())


def head_backward(x: Operands, logps: Tensor, grad: Tensor, kept: Kept, call: HeadCall) -> Gradients:
    """The gradients that `call.needs` names, of this shard, from grad = dL/dlp [N] fp32; uses kept tiles up."""
    if kept.plan.name == "frozen":
        hidden = kept.unit * grad.unsqueeze(1) if call.needs.hidden else None
        return Gradients(hidden, low=kept.unit_low * grad.unsqueeze(1) if call.needs.low else None)
    plan, buffers, found = kept.plan, Buffers(x.hidden.device), Gradients.allocate(x, kept, call)
    state = TileState.start(x.targets, call.options, kept.maximum)
    scaled, fp32 = call.options.slope * grad, torch.float32
    for k, v0, v1 in plan.columns():
        head = Columns.take(x, v0, v1, buffers)
        summed = None
        if found.weight is not None:
            direct = found.weight.dtype == fp32
            summed = found.weight[v0:v1] if direct else buffers.get("grad_weight", head.weight.shape, fp32)
        for c, n0, n1 in plan.chunks():
            chunk, shape = slice(n0, n1), (n1 - n0, v1 - v0)
            keep = kept.keeps(k, c)
            if keep:
                z = kept.tile(k, c, *shape, padded=True)
            else:
                z = head.logits(buffers.padded("logits", *shape, fp32), x, chunk)
            in_place = call.compute == fp32 and (call.reuse or not keep)
            out = z if in_place else buffers.padded("rounded", *shape, call.compute)
            tile = tile_gradient(z, out, state.rows(n0, n1), v0, kept.inverse[chunk], scaled[chunk])
            if found.bias is not None:
                found.bias[v0:v1] += tile.sum(0, dtype=fp32)
            if found.hidden is not None:
                product(found.hidden[chunk], tile, head.weight, add=k > 0)
            if found.low is not None and head.factor is not None:
                product(found.low[chunk], tile, head.factor, add=k > 0)
            if summed is not None:
                product(summed, tile.t(), x.hidden[chunk], add=c > 0)
            if found.factor is not None and x.low is not None:
                product(found.factor[v0:v1], tile.t(), x.low[chunk], add=c > 0)
        if found.weight is not None and summed is not None and found.weight.dtype != fp32:
            found.weight[v0:v1].copy_(summed)
    if found.bias is not None and x.bias is not None:
        found.bias = found.bias.to(x.bias.dtype)
    if found.factor is not None and x.factor is not None:
        found.factor = found.factor.to(x.factor.dtype)
    return found
