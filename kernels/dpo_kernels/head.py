"""linear_token_logps: log-probs through the LM head, without [N, V] logits beyond the workspace.

Shapes: N rows, n rows of a chunk, V vocabulary, v columns of a tile, H hidden. The vocabulary is the outer loop: each
tile of the weight is read (and cast) once a pass and each tile of its gradient is written once; inner row chunks
share it. Order: buffers, forward, backward, autograd, public function.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backends import resolve_backend
from .common import (
    LogitOptions,
    TokenStats,
    accumulation_dtype,
    check_float,
    check_index,
    check_same_device,
    check_shape,
    check_stats,
)
from .plans import ALIGN, Plan, choose_plan
from .products import product_nt, takes_onednn
from .tiles import RowState, TileTargets, cap_derivative, fold_tile, gradient_tile, shape_tile

CONTIGUOUS = torch.contiguous_format


@dataclass(frozen=True, slots=True)
class HeadCall:
    """The non-tensor arguments of one call."""

    options: LogitOptions
    plan: Plan
    stats: tuple[str, ...]
    compute: torch.dtype
    """Of the GEMMs."""
    wide: torch.dtype
    """Of log-probs, tiles' arithmetic and accumulation: float32 or float64."""
    backend: str = "torch"

    @property
    def in_place(self) -> bool:
        """A kept tile holds exponentials, which only need scaling; otherwise it holds the GEMM's raw output."""
        return self.compute == self.wide and self.options.softcap is None


@dataclass(slots=True)
class Buffers:
    """Scratch of one pass, allocated once and reused by every tile."""

    call: HeadCall
    device: torch.device
    held: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous view of the buffer `name`; its contents are arbitrary."""
        size = math.prod(shape)
        flat = self.held.get(name)
        if flat is None or flat.numel() < size:
            flat = self.held[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    def weight(self, weight: Tensor, start: int, stop: int) -> Tensor:
        """Rows of the weight in the GEMM's dtype."""
        part = weight[start:stop]
        if part.dtype == self.call.compute:
            return part
        return self.get("weight", part.shape, self.call.compute).copy_(part)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[n, v] raw logits of a tile."""
        if takes_onednn(hidden, weight):
            return product_nt(hidden, weight)
        return torch.mm(hidden, weight.t(), out=self.get("logits", (hidden.shape[0], weight.shape[0]), hidden.dtype))

    def rounded(self, tile: Tensor) -> Tensor:
        """A gradient tile in the GEMM's dtype."""
        if tile.dtype == self.call.compute:
            return tile
        return self.get("rounded", tile.shape, self.call.compute).copy_(tile)

    def add_product(self, out: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
        """out += a @ b (out = a @ b if `first`); a product of lower precision than `out` is rounded once before."""
        if out.dtype != a.dtype:
            product = torch.mm(a, b, out=self.get("product", out.shape, a.dtype))
            out.copy_(product) if first else out.add_(product)
        elif takes_onednn(a, b) and a.is_contiguous():  # it would copy a transposed tile, for little gain
            product = product_nt(a, b.t())
            out.copy_(product) if first else out.add_(product)
        elif first:
            torch.mm(a, b, out=out)
        else:
            out.addmm_(a, b)


@dataclass(frozen=True, slots=True)
class Loan:
    """The weight gradient's memory, lent to kept tiles until the gradient is written.

    Tile k's kept logits lie one tile further than its gradient, so writing gradients in order only ever overwrites
    tiles that are used up.
    """

    storage: Tensor
    """1-D, the weight's dtype: the gradient [V, H], its last tile filled up, and one more tile."""
    plan: Plan

    @classmethod
    def allocate(cls, weight: Tensor, plan: Plan) -> "Loan":
        size = (plan.vocab_tiles + 1) * plan.vocab_tile * weight.shape[1] + 2 * ALIGN
        return cls(torch.empty(size, dtype=weight.dtype, device=weight.device), plan)

    def slot(self, k: int, c: int, shape: tuple[int, int], width: int, dtype: torch.dtype) -> Tensor:
        """Where the logits [n, v] of tile k and row chunk c are kept; width is H."""
        tile = self.plan.vocab_tile * width * self.storage.dtype.itemsize
        each = self.plan.row_chunk * self.plan.vocab_tile * dtype.itemsize
        start = (-(-k * tile // ALIGN) + -(-tile // ALIGN) + c * -(-each // ALIGN)) * ALIGN
        size = math.prod(shape) * dtype.itemsize
        return self.storage.view(torch.uint8)[start : start + size].view(dtype).view(shape)

    def gradient(self, weight: Tensor) -> Tensor:
        return self.storage[: weight.numel()].view(weight.shape)


@dataclass(slots=True)
class Kept:
    """What the forward leaves for the backward beside inputs and outputs."""

    maximum: Tensor
    """[N]"""
    inverse: Tensor
    """[N] 1 / sum exp(x - maximum)"""
    tiles: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Tile index: (the tile, the maximum [n] it was exponentiated against). Used up by the backward."""
    unit: Tensor | None = None
    """[N, H] d lp / d hidden (frozen plan)."""
    loan: Loan | None = None
    """Memory of the first `plan.lent` tiles."""


def _shaped(z: Tensor, bias: Tensor | None, buffers: Buffers, keep: bool) -> Tensor:
    """The GEMM's output as shaped logits in the wide dtype, in place unless that would spoil a kept tile."""
    call = buffers.call
    x = z
    if z.dtype != call.wide or (keep and not call.in_place):
        x = buffers.get("wide", z.shape, call.wide).copy_(z)
    if bias is not None:
        x.add_(bias)
    return shape_tile(x, call.options)


def head_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: HeadCall
) -> tuple[Tensor, dict[str, Tensor], Kept]:
    """hidden [N, H] (GEMM dtype), weight [V, H], targets [N] (all kept): log-probs [N], statistics, `Kept`."""
    plan, buffers = call.plan, Buffers(call, hidden.device)
    state = RowState.start(hidden.shape[0], call.wide, hidden.device, call.stats)
    kept = Kept(state.maximum, state.maximum)
    if plan.name == "frozen":
        kept.unit = torch.empty(hidden.shape, dtype=call.wide, device=hidden.device)
    if plan.lent:
        kept.loan = Loan.allocate(weight, plan)
    for k, v0, v1 in plan.columns():
        w = buffers.weight(weight, v0, v1)
        b = None if bias is None else bias[v0:v1].to(call.wide)
        for c, n0, n1 in plan.chunks():
            keep = plan.tile_index(k, c) < plan.retained
            h = hidden[n0:n1]
            if kept.loan is not None and plan.tile_index(k, c) < plan.lent:
                slot = kept.loan.slot(k, c, (n1 - n0, v1 - v0), hidden.shape[1], call.compute)
                z = slot.copy_(product_nt(h, w)) if takes_onednn(h, w) else torch.mm(h, w.t(), out=slot)
            elif takes_onednn(h, w) or not keep:
                z = buffers.logits(h, w)
            else:
                z = torch.mm(h, w.t())
            x = _shaped(z, b, buffers, keep)
            derivative = cap_derivative(x, call.options) if kept.unit is not None else None
            rows, where = state.rows(n0, n1), TileTargets.locate(targets[n0:n1], v0, v1 - v0)
            rescale = fold_tile(x, rows, where)
            if keep:
                kept.tiles[plan.tile_index(k, c)] = z, rows.maximum.clone()
            if kept.unit is not None:
                where.write(x, x.new_zeros(()))
                if derivative is not None:
                    x.mul_(derivative)
                unit = kept.unit[n0:n1]
                if k > 0:
                    unit.mul_(rescale.unsqueeze(1))
                buffers.add_product(unit, buffers.rounded(x), w, first=k == 0)
            del x, z  # or the next tile would stand beside this one
    kept.inverse = state.inverse_total()
    logps = state.logps()
    if kept.unit is not None:
        _finish_unit(kept.unit, kept.inverse, logps, state.target, weight, targets, call)
    return logps, state.stats(call.stats, weight.shape[0]), kept


def _finish_unit(
    unit: Tensor, inverse: Tensor, logps: Tensor, target: Tensor, weight: Tensor, targets: Tensor, call: HeadCall
) -> None:
    """unit = sum over other tokens of exp(x - m) W becomes slope * ((1 - p_target) W_target - unit / s), in place."""
    slope = call.options.slope
    unit.mul_((-slope * inverse).unsqueeze(1))
    share = -slope * logps.expm1()
    derivative = cap_derivative(target, call.options)
    if derivative is not None:
        share = share * derivative
    for _, start, stop in call.plan.chunks():
        rows = weight.index_select(0, targets[start:stop]).to(call.wide)
        unit[start:stop].addcmul_(share[start:stop].unsqueeze(1), rows)


def head_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    grad: Tensor,
    kept: Kept,
    needs: tuple[bool, bool, bool],
    call: HeadCall,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dL/dhidden [N, H] (wide dtype), dL/dweight and dL/dbias (their dtypes) where needed, from grad = dL/dlp [N]."""
    if kept.unit is not None:
        return kept.unit * grad.unsqueeze(1), None, None
    plan, buffers = call.plan, Buffers(call, hidden.device)
    grad_hidden = torch.empty(hidden.shape, dtype=call.wide, device=hidden.device) if needs[0] else None
    loan, kept.loan = kept.loan, None
    grad_weight = None
    if needs[1]:
        grad_weight = loan.gradient(weight) if loan is not None else torch.empty_like(weight, memory_format=CONTIGUOUS)
    grad_bias = torch.zeros(bias.shape, dtype=call.wide, device=bias.device) if needs[2] and bias is not None else None
    scaled = call.options.slope * grad
    coefficient, at_target = -scaled * kept.inverse, -scaled * logps.expm1()
    single = plan.row_chunks == 1
    for k, v0, v1 in plan.columns():
        w = buffers.weight(weight, v0, v1)
        b = None if bias is None else bias[v0:v1].to(call.wide)
        grad_w = None
        if grad_weight is not None:
            grad_w = grad_weight[v0:v1]
            if grad_w.dtype != call.wide and not (single and grad_w.dtype == call.compute):
                grad_w = buffers.get("grad_weight", grad_w.shape, call.wide)
        for c, n0, n1 in plan.chunks():
            h, m = hidden[n0:n1], kept.maximum[n0:n1]
            found = kept.tiles.pop(plan.tile_index(k, c), None)
            z = found[0] if found is not None else buffers.logits(h, w)
            if found is not None and call.in_place:
                x, derivative = z, None
                scale = coefficient[n0:n1] * (found[1] - m).exp_()
            else:
                x = _shaped(z, b, buffers, keep=False)
                derivative = cap_derivative(x, call.options)
                x.sub_(m.unsqueeze(1)).exp_()
                scale = coefficient[n0:n1]
            where = TileTargets.locate(targets[n0:n1], v0, v1 - v0)
            gradient_tile(x, where, scale, at_target[n0:n1], derivative)
            if grad_bias is not None:
                grad_bias[v0:v1] += x.sum(0)
            tile = buffers.rounded(x)
            if grad_hidden is not None:
                buffers.add_product(grad_hidden[n0:n1], tile, w, first=k == 0)
            if grad_w is not None:
                buffers.add_product(grad_w, tile.t(), h, first=c == 0)
            del x, z, tile, found
        if grad_weight is not None and grad_w is not None and grad_w.data_ptr() != grad_weight[v0:v1].data_ptr():
            grad_weight[v0:v1].copy_(grad_w)
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


class _LinearTokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, call: HeadCall):
        with torch.autocast(hidden.device.type, enabled=False):
            compute = hidden.to(call.compute)
            if call.backend == "triton":
                from . import tri

                tile = call.plan, call.options, call.stats
                logps, found, kept = tri.head_forward(compute, weight, bias, targets, *tile)
            else:
                logps, found, kept = head_forward(compute, weight, bias, targets, call)
        ctx.call, ctx.kept = call, kept
        ctx.save_for_backward(hidden, weight, bias, targets, logps)
        stats = tuple(found[name] for name in call.stats)
        ctx.mark_non_differentiable(*stats)
        return logps, *stats

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, weight, bias, targets, logps = ctx.saved_tensors
        needs, call = ctx.needs_input_grad[:3], ctx.call
        grad = grad_outputs[0].to(call.wide)
        with torch.autocast(hidden.device.type, enabled=False):
            compute = hidden.to(call.compute)
            if call.backend == "triton":
                from . import tri

                found = tri.head_backward(compute, weight, bias, grad, ctx.kept, needs, call.plan)
            else:
                found = head_backward(compute, weight, bias, targets, logps, grad, ctx.kept, needs, call)
        grad_hidden = found[0].to(hidden.dtype) if found[0] is not None else None
        return grad_hidden, found[1], found[2], None, None


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 keeps its own, as everywhere in autocast), else the wider input's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _check(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int) -> Tensor:
    """targets as int64; ValueError names what does not fit."""
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected shape [N, H], found {list(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape [V, H] with V >= 1, found {list(weight.shape)}")
    check_shape("weight", weight, (weight.shape[0], hidden.shape[1]), "[V, H] with hidden's H")
    if bias is not None:
        check_float("bias", bias)
        check_shape("bias", bias, weight.shape[:1], "[V]")
    check_shape("targets", targets, hidden.shape[:1], "one a row of hidden")
    check_same_device(hidden=hidden, weight=weight, bias=bias, targets=targets)
    return check_index("targets", targets, weight.shape[0], allow=ignore_index)


class HeadArguments(TypedDict, total=False):
    """Keyword arguments of `linear_token_logps` beside `stats`, for its overloads."""

    bias: Tensor | None
    ignore_index: int
    temperature: float
    logit_scale: float
    softcap: float | None
    plan: str
    workspace_bytes: int | None
    backend: str | None


@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, stats: tuple[()] = (), **options: Unpack[HeadArguments]
) -> Tensor: ...


@overload
def linear_token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, stats: Sequence[str], **options: Unpack[HeadArguments]
) -> TokenStats: ...


def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    stats: Sequence[str] = (),
    backend: str | None = None,
) -> Tensor | TokenStats:
    """log softmax(x)[target], x = cap(logit_scale * (hidden @ weight.T + bias)) / temperature.

    hidden [N, H], weight [V, H], bias [V] or None, in any floating dtypes; targets [N] in [0, V) or `ignore_index`.
    Returns [N] in fp32 (float64 where an input is float64), 0 where ignored; with `stats`, `TokenStats`. GEMMs run in
    autocast's dtype where autocast is on, else in the wider of hidden's and weight's. Gradients for hidden, weight and
    bias, each where required, in their dtypes; those of the weight accumulate in fp32. `plan` and `workspace_bytes`
    are `choose_plan`'s; a row's log-prob is bitwise the same for every plan, with and without gradient. ValueError
    names a bad argument.
    """
    targets = _check(hidden, weight, bias, targets, ignore_index)
    compute = _compute_dtype(hidden, weight)
    dtypes = (
        (hidden.dtype, weight.dtype, compute) if bias is None else (hidden.dtype, weight.dtype, bias.dtype, compute)
    )
    chosen_backend = resolve_backend(backend, hidden.device, *dtypes)
    triton = chosen_backend == "triton"
    rows, labels, total, kept = hidden, targets, targets.numel(), None
    if not triton:
        kept = (targets != ignore_index).nonzero().squeeze(1)
        if kept.numel() < total:
            rows, labels = hidden.index_select(0, kept), targets[kept]
    grad = torch.is_grad_enabled()
    head_grad = grad and (weight.requires_grad or (bias is not None and bias.requires_grad))
    chosen = choose_plan(
        rows.shape[0],
        weight.shape[0],
        weight.shape[1],
        compute,
        head_grad,
        workspace_bytes,
        plan=plan,
        hidden_requires_grad=grad and hidden.requires_grad,
        weight_grad_dtype=weight.dtype if grad and weight.requires_grad and not triton else None,
        kept_dtype=torch.float32 if triton else None,
        device="cuda" if triton else hidden.device.type,
    )
    options = LogitOptions(ignore_index, temperature, logit_scale, softcap)
    wide = accumulation_dtype(hidden.dtype, weight.dtype)
    call = HeadCall(options, chosen, check_stats(stats), compute, wide, chosen_backend)
    logps, *found = _LinearTokenLogps.apply(rows, weight, bias, labels, call)
    if kept is not None and kept.numel() < total:
        logps, *found = (part.new_zeros(total).index_copy(0, kept, part) for part in (logps, *found))
    return TokenStats(logps, **dict(zip(call.stats, found, strict=True))) if call.stats else logps
