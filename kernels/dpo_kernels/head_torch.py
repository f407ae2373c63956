"""The LM head in torch: tiles of logits folded into their rows' statistics, then turned into gradients.

Shapes: N rows, n rows of a chunk, V vocabulary, v columns of a tile, H hidden, r rank of LoRA factors. The vocabulary
is the outer loop: each tile of the weight is read (and cast) once a pass and each tile of its gradient is written once;
inner row chunks share it. Low-rank products are done in the wide dtype. Order: products, forward, backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import sharding
from .plans import Plan
from .products import product_nt, takes_onednn
from .storage import Buffers, HeadCall, Kept, Operands
from .tiles import RowState, TileTargets, cap_derivative, fold_tile, gradient_tile, shape_tile


@dataclass(slots=True)
class Pass:
    """One walk over the tiles."""

    call: HeadCall
    x: Operands
    plan: Plan
    buffers: Buffers
    low: Tensor | None
    """[N, r] wide"""

    @classmethod
    def start(cls, x: Operands, plan: Plan, call: HeadCall) -> "Pass":
        low = None if x.low is None else x.low.to(call.wide)
        return cls(call, x, plan, Buffers(x.hidden.device), low)

    def weight(self, start: int, stop: int) -> Tensor:
        """Rows of the weight in the GEMM's dtype."""
        return self.buffers.cast("weight", self.x.weight[start:stop], self.call.compute)

    def bias(self, start: int, stop: int) -> Tensor | None:
        return None if self.x.bias is None else self.x.bias[start:stop].to(self.call.wide)

    def factor(self, start: int, stop: int) -> Tensor | None:
        """Rows of LoRA's second factor, wide."""
        return None if self.x.factor is None else self.x.factor[start:stop].to(self.call.wide)

    def logits(self, hidden: Tensor, weight: Tensor, slot: Tensor | None = None) -> Tensor:
        """[n, v] the GEMM's output for a tile, in its slot where it has one."""
        if takes_onednn(hidden, weight):
            z = product_nt(hidden, weight)
            return z if slot is None else slot.copy_(z)
        if slot is None:
            slot = self.buffers.get("logits", (hidden.shape[0], weight.shape[0]), hidden.dtype)
        return torch.mm(hidden, weight.t(), out=slot)

    def shaped(self, z: Tensor, rows: slice, bias: Tensor | None, factor: Tensor | None, *, keep: bool) -> Tensor:
        """The GEMM's output as shaped logits in the wide dtype, in place unless that would spoil a kept tile."""
        x, wide = z, self.call.wide
        if z.dtype != wide or (keep and not self.call.in_place):
            x = self.buffers.get("wide", z.shape, wide).copy_(z)
        if self.low is not None and factor is not None:
            x.addmm_(self.low[rows], factor.t())
        if bias is not None:
            x.add_(bias)
        return shape_tile(x, self.call.options)

    def rounded(self, tile: Tensor) -> Tensor:
        """A gradient tile in the GEMM's dtype."""
        return self.buffers.cast("rounded", tile, self.call.compute)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
        """out += a @ b (out = a @ b if `first`); a product of lower precision than `out` is rounded once before."""
        if out.dtype != a.dtype:
            product = torch.mm(a, b, out=self.buffers.get("product", out.shape, a.dtype))
            out.copy_(product) if first else out.add_(product)
        elif takes_onednn(a, b):
            product = product_nt(a, b.t())
            out.copy_(product) if first else out.add_(product)
        elif first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)


def head_forward(
    x: Operands, shard: sharding.Shard, call: HeadCall, kept: Kept
) -> tuple[Tensor, dict[str, Tensor], Tensor, Tensor]:
    """log-probs [N] and statistics of rows that are all kept; fills `kept` but for its two vectors.

    Returns them too: the rows' maximum and 1/sum over the whole vocabulary.
    """
    plan, walk = kept.plan, Pass.start(x, kept.plan, call)
    state = RowState.start(x.hidden.shape[0], call.wide, x.hidden.device, call.stats)
    frozen = plan.name == "frozen"
    for k, v0, v1 in plan.columns():
        weight, bias, factor = walk.weight(v0, v1), walk.bias(v0, v1), walk.factor(v0, v1)
        for c, n0, n1 in plan.chunks():
            keep, chunk = kept.keeps(k, c), slice(n0, n1)
            z = walk.logits(x.hidden[chunk], weight, kept.tile(k, c, n1 - n0, v1 - v0) if keep else None)
            tile = walk.shaped(z, chunk, bias, factor, keep=keep)
            derivative = cap_derivative(tile, call.options) if frozen else None
            rows, where = state.rows(n0, n1), TileTargets.locate(x.targets[chunk], v0, v1 - v0)
            rescale = fold_tile(tile, rows, where)
            if keep and call.in_place:
                kept.shifts[k, chunk] = rows.maximum
            if frozen:
                where.write(tile, tile.new_zeros(()))
                if derivative is not None:
                    tile.mul_(derivative)
                if k > 0:
                    kept.unit[chunk].mul_(rescale.unsqueeze(1))
                walk.add_product(kept.unit[chunk], walk.rounded(tile), weight, first=k == 0)
                if factor is not None:
                    if k > 0:
                        kept.unit_low[chunk].mul_(rescale.unsqueeze(1))
                    walk.add_product(kept.unit_low[chunk], tile, factor, first=k == 0)
            del tile, z  # or the next tile would stand beside this one
    scale = _merge_shards(state, call.group) if call.group else None
    inverse, logps = state.inverse_total(), state.logps()
    if frozen:
        _finish_units(kept, x, state, inverse, logps, scale, shard, call)
    return logps, state.stats(call.stats, shard.vocabulary), state.maximum, inverse


def _merge_shards(state: RowState, group: str) -> Tensor:
    """Make the state that of the whole vocabulary; returns exp(shard's maximum - whole maximum) [N]."""
    whole, scale = sharding.merge(sharding.RowSums(*state.sums), 1.0, group)
    for mine, merged in zip(state.sums, whole, strict=True):
        if mine is not None and merged is not None:
            mine.copy_(merged)
    return scale.to(state.maximum.dtype)


def _finish_units(
    kept: Kept,
    x: Operands,
    state: RowState,
    inverse: Tensor,
    logps: Tensor,
    scale: Tensor | None,
    shard: sharding.Shard,
    call: HeadCall,
) -> None:
    """unit = sum over other tokens of exp(x - m) W becomes slope * ((1 - p_target) W_target - unit / s), in place."""
    slope = call.options.slope
    share = -slope * logps.expm1()
    derivative = cap_derivative(state.target, call.options)
    if derivative is not None:
        share = share * derivative
    targets = x.targets
    if shard.elsewhere is not None:
        share = share.where(targets != shard.elsewhere, 0.0)
        targets = targets.clamp(min=0)
    others = inverse if scale is None else inverse * scale
    for unit, head in ((kept.unit, x.weight), (kept.unit_low, x.factor)):
        if head is None:
            continue
        unit.mul_((-slope * others).unsqueeze(1))
        for _, start, stop in kept.plan.chunks():
            rows = head.index_select(0, targets[start:stop]).to(call.wide)
            unit[start:stop].addcmul_(share[start:stop].unsqueeze(1), rows)


@dataclass(slots=True)
class Gradients:
    """Gradients of `Operands`, None where not wanted: of hidden and low in the wide dtype, else in the operand's."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low: Tensor | None = None
    factor: Tensor | None = None

    @classmethod
    def allocate(cls, x: Operands, kept: Kept, call: HeadCall) -> "Gradients":
        """Rows uninitialised, the weight's too (in lent memory where there is some); sums of columns at zero."""
        found, device, wide = cls(), x.hidden.device, call.wide
        if call.needs.hidden:
            found.hidden = torch.empty(x.hidden.shape, dtype=wide, device=device)
        if call.needs.weight:
            found.weight = kept.gradient(x.weight)
        if call.needs.bias and x.bias is not None:
            found.bias = torch.zeros(x.bias.shape, dtype=wide, device=device)
        if call.needs.low and x.low is not None:
            found.low = torch.empty(x.low.shape, dtype=wide, device=device)
        if call.needs.factor and x.factor is not None:
            found.factor = torch.empty(x.factor.shape, dtype=wide, device=device)
        return found


def head_backward(x: Operands, logps: Tensor, grad: Tensor, kept: Kept, call: HeadCall) -> Gradients:
    """The gradients that `call.needs` names, of this shard, from grad = dL/dlp [N]; uses kept tiles up."""
    if kept.plan.name == "frozen":
        hidden = kept.unit * grad.unsqueeze(1) if call.needs.hidden else None
        return Gradients(hidden, low=kept.unit_low * grad.unsqueeze(1) if call.needs.low else None)
    plan, walk, found = kept.plan, Pass.start(x, kept.plan, call), Gradients.allocate(x, kept, call)
    scaled = call.options.slope * grad
    coefficient, at_target = -scaled * kept.inverse, -scaled * logps.expm1()
    for k, v0, v1 in plan.columns():
        weight, bias, factor = walk.weight(v0, v1), walk.bias(v0, v1), walk.factor(v0, v1)
        grad_w = None
        if found.weight is not None:
            grad_w = found.weight[v0:v1]
            if grad_w.dtype != call.wide and not (plan.row_chunks == 1 and grad_w.dtype == call.compute):
                grad_w = walk.buffers.get("grad_weight", grad_w.shape, call.wide)
        for c, n0, n1 in plan.chunks():
            chunk = slice(n0, n1)
            tile = _gradient_tile(walk, k, c, v0, v1, chunk, kept, (weight, bias, factor), coefficient, at_target)
            if found.bias is not None:
                found.bias[v0:v1] += tile.sum(0)
            if found.low is not None and factor is not None:
                walk.add_product(found.low[chunk], tile, factor, first=k == 0)
            if found.factor is not None and walk.low is not None:
                walk.add_product(found.factor[v0:v1], tile.t(), walk.low[chunk], first=c == 0)
            rounded = walk.rounded(tile)
            if found.hidden is not None:
                walk.add_product(found.hidden[chunk], rounded, weight, first=k == 0)
            if grad_w is not None:
                walk.add_product(grad_w, rounded.t(), x.hidden[chunk], first=c == 0)
            del tile, rounded
        if found.weight is not None and grad_w is not None and grad_w.data_ptr() != found.weight[v0:v1].data_ptr():
            found.weight[v0:v1].copy_(grad_w)
    if found.bias is not None and x.bias is not None:
        found.bias = found.bias.to(x.bias.dtype)
    if found.factor is not None and x.factor is not None:
        found.factor = found.factor.to(x.factor.dtype)
    return found


def _gradient_tile(
    walk: Pass,
    k: int,
    c: int,
    v0: int,
    v1: int,
    chunk: slice,
    kept: Kept,
    head: tuple[Tensor, Tensor | None, Tensor | None],
    coefficient: Tensor,
    at_target: Tensor,
) -> Tensor:
    """dL/dz [n, v] in the wide dtype, from the kept tile or from a second GEMM."""
    x, call, (weight, bias, factor) = walk.x, walk.call, head
    keep = kept.keeps(k, c)
    hidden, m, scale = x.hidden[chunk], kept.maximum[chunk], coefficient[chunk]
    z = kept.tile(k, c, hidden.shape[0], v1 - v0) if keep else walk.logits(hidden, weight)
    if keep and call.in_place:
        tile = z if call.reuse else walk.buffers.get("logits", z.shape, z.dtype).copy_(z)
        derivative = None
        scale = scale * (kept.shifts[k, chunk] - m).exp_()
    else:
        tile = walk.shaped(z, chunk, bias, factor, keep=keep and not call.reuse)
        derivative = cap_derivative(tile, call.options)
        tile.sub_(m.unsqueeze(1)).exp_()
    where = TileTargets.locate(x.targets[chunk], v0, v1 - v0)
    gradient_tile(tile, where, scale, at_target[chunk], derivative)
    return tile
