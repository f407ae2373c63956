"""The LM head's log-probs as `torch.library` operators, as `operators.py`, which see.

N rows, V vocabulary (of this rank's shard), H hidden, r rank of LoRA factors. What the forward keeps for the backward
are outputs, flat and sized by shapes alone (`storage.Kept`). With `reuse` the backward works in kept tiles and writes
the weight's gradient into memory lent to them: it mutates both. Traced graphs, where that would only make copies, do
without. Order: arguments, forward, backward, autograd.
"""

from dataclasses import replace

import torch
from torch import Tensor

from . import sharding
from .common import STATS, LogitOptions
from .storage import HeadCall, Kept, Needs, Operands

KEPT = 7
"""Tensors of `storage.Kept`."""
OPERANDS = 5
"""Operands that may need gradients: hidden, weight, bias, low, factor."""
REUSE = 8
"""Place of `reuse` among the numbers."""


def _call(
    needs: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    stats: int,
    plan: str,
    workspace_bytes: int,
    reuse: bool,
    compute: torch.dtype,
    backend: str,
    group: str,
) -> HeadCall:
    options = LogitOptions(ignore_index, temperature, logit_scale, softcap or None)
    names = tuple(name for bit, name in enumerate(STATS) if stats >> bit & 1)
    wide = torch.float64 if compute == torch.float64 else torch.float32
    workspace = None if workspace_bytes < 0 else workspace_bytes
    return HeadCall(options, names, Needs.of(needs), plan, workspace, reuse, compute, wide, backend, group)


def _kept_rows(targets: Tensor, call: HeadCall) -> Tensor | None:
    """Rows to be computed, or None for all: on a GPU, leaving out ignored rows would need a host synchronisation."""
    if call.backend == "triton":
        return None
    kept = (targets != call.options.ignore_index).nonzero().squeeze(1)
    return None if kept.numel() == targets.numel() else kept


def _operands(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    targets: Tensor,
    rows: Tensor | None,
    call: HeadCall,
) -> Operands:
    """The operands of the rows to be computed, in the GEMMs' dtype."""
    if rows is not None:
        hidden, targets = hidden.index_select(0, rows), targets[rows]
        low = None if low is None else low.index_select(0, rows)
    low = None if low is None else low.to(call.compute)
    return Operands(hidden.to(call.compute), weight, bias, low, factor, targets)


def _of_rows(kept: Kept, rows: int) -> Kept:
    """The memory of the first `rows` rows, which stand for those that are computed."""
    return replace(
        kept,
        plan=kept.plan.for_rows(rows),
        maximum=kept.maximum[:rows],
        inverse=kept.inverse[:rows],
        unit=kept.unit[:rows],
        unit_low=kept.unit_low[:rows],
        shifts=kept.shifts[:, :rows],
    )


def _spread(part: Tensor, rows: Tensor | None, count: int) -> Tensor:
    """Values of the rows that were computed, among zeros for the others."""
    return part if rows is None else part.new_zeros(count, *part.shape[1:]).index_copy(0, rows, part)


@torch.library.custom_op("dpo_kernels::linear_token_logps", mutates_args=())
def linear_token_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    targets: Tensor,
    needs: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    stats: int,
    plan: str,
    workspace_bytes: int,
    reuse: bool,
    compute: torch.dtype,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], bias [V], low [N, r], factor [V, r], targets [N] -> logps [N], statistics
    [count, N], and the tensors of `storage.Kept`. needs: mask of operands that will need gradients; workspace_bytes -1:
    the device's default; reuse: the backward may use kept memory up. Gradient: logps.
    """
    numbers = needs, ignore_index, temperature, logit_scale, softcap, stats, plan, workspace_bytes, reuse
    call = _call(*numbers, compute, backend, group)
    layout = call.layout(hidden, weight, low)
    with torch.autocast(hidden.device.type, enabled=False):
        kept = Kept.allocate(layout, call, hidden, weight, low)
        shard = sharding.locate(targets, weight.shape[0], ignore_index, group)
        rows = _kept_rows(targets, call)
        operands = _operands(hidden, weight, bias, low, factor, shard.targets, rows, call)
        inner = _of_rows(kept, operands.targets.numel())
        if backend == "triton":
            from .tri import head_forward
        else:
            from .head_torch import head_forward
        logps, found, maximum, inverse = head_forward(operands, shard, call, inner)
        kept.maximum.zero_()[: maximum.numel()].copy_(maximum)
        kept.inverse.zero_()[: inverse.numel()].copy_(inverse)
        parts = [_spread(part, rows, targets.numel()) for part in (logps, *(found[name] for name in call.stats))]
    values = [part.to(call.wide) for part in parts[1:]]
    return parts[0], torch.stack(values) if values else logps.new_empty(0, targets.numel()), *kept.tensors


@linear_token_logps.register_fake
def _(hidden, weight, bias, low, factor, targets, *numbers):
    call = _call(*numbers)
    kept = Kept.allocate(call.layout(hidden, weight, low), call, hidden, weight, low)
    logps = hidden.new_empty(targets.shape, dtype=call.wide)
    return logps, logps.new_empty(len(call.stats), targets.numel()), *kept.tensors


def _backward(
    grad: Tensor, operands: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], targets: Tensor,
    logps: Tensor, tensors: tuple[Tensor, ...], wanted: int, call: HeadCall,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dL/d operands, empty where `wanted`, a mask, has no bit, or, the weight's, where it lies in lent memory."""
    hidden, weight, _, low, _ = operands
    layout = call.layout(hidden, weight, low)
    kept = Kept(layout, *tensors)
    if not kept.own.numel() and not kept.loan.numel():
        kept = replace(kept, plan=replace(layout, retained=0, lent=0))
    call = replace(call, needs=Needs.of(wanted))
    with torch.autocast(hidden.device.type, enabled=False):
        shard = sharding.locate(targets, weight.shape[0], call.options.ignore_index, call.group)
        rows = _kept_rows(targets, call)
        taken = _operands(*operands, shard.targets, rows, call)
        if rows is not None:
            grad, logps = grad[rows], logps[rows]
        if call.backend == "triton":
            from .tri import head_backward
        else:
            from .head_torch import head_backward
        inner = _of_rows(kept, taken.targets.numel())
        found = head_backward(taken, logps, grad.to(call.wide), inner, call)
        sharding.sum_over_ranks(call.group, found.hidden, found.low)
        by_row = [
            None if part is None else _spread(part.to(like.dtype), rows, targets.numel())
            for part, like in ((found.hidden, hidden), (found.low, hidden if low is None else low))
        ]
    by_column = None if kept.loan.numel() else found.weight
    every = by_row[0], by_column, found.bias, by_row[1], found.factor
    return tuple(part if part is not None else logps.new_empty(0) for part in every)  # pyright: ignore[reportReturnType]


def _like_gradients(grad, hidden, weight, bias, low, factor, targets, logps, *rest):
    (*_, loan, _), wanted = rest[:KEPT], Needs.of(rest[KEPT])
    every = (hidden, None if loan.numel() else weight, bias, low, factor)
    return tuple(
        torch.empty(like.shape, dtype=like.dtype, device=like.device)
        if need and like is not None
        else logps.new_empty(0)
        for like, need in zip(every, wanted, strict=True)
    )


def _gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    factor: Tensor | None,
    targets: Tensor,
    logps: Tensor,
    maximum: Tensor,
    inverse: Tensor,
    unit: Tensor,
    unit_low: Tensor,
    own: Tensor,
    loan: Tensor,
    shifts: Tensor,
    wanted: int,
    needs: int,
    ignore_index: int,
    temperature: float,
    logit_scale: float,
    softcap: float,
    stats: int,
    plan: str,
    workspace_bytes: int,
    reuse: bool,
    compute: torch.dtype,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dL/d hidden, weight, bias, low, factor from grad = dL/dlogps [N]; empty where `wanted`, a mask, has no bit.

    With empty `own` everything is recomputed. With `reuse` kept tiles are used up, and the weight's gradient is written
    into `loan`, unless empty: that call is an operator of its own, which says so.
    """
    numbers = needs, ignore_index, temperature, logit_scale, softcap, stats, plan, workspace_bytes, reuse
    tensors = maximum, inverse, unit, unit_low, own, loan, shifts
    call = _call(*numbers, compute, backend, group)
    return _backward(grad, (hidden, weight, bias, low, factor), targets, logps, tensors, wanted, call)


linear_token_logps_backward = torch.library.custom_op(
    "dpo_kernels::linear_token_logps_backward", _gradients, mutates_args=()
)
linear_token_logps_backward_ = torch.library.custom_op(
    "dpo_kernels::linear_token_logps_backward_", _gradients, mutates_args={"own", "loan"}
)
linear_token_logps_backward.register_fake(_like_gradients)
linear_token_logps_backward_.register_fake(_like_gradients)


def _save(ctx, inputs, output) -> None:
    *tensors, targets = inputs[: OPERANDS + 1]
    ctx.numbers = inputs[OPERANDS + 1 :]
    logps, _, *kept = output
    *vectors, own, loan, shifts = kept
    ctx.save_for_backward(*tensors, targets, logps, *vectors, shifts)
    # Not saved but held: where it may reuse them the backward uses them up, and a second one does without.
    ctx.own, ctx.loan, ctx.reuse = own, loan, ctx.numbers[REUSE]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradient(ctx, grad, *_):
    if grad is None:
        return (None,) * (OPERANDS + 1 + len(ctx.numbers))
    *operands, targets, logps, maximum, inverse, unit, unit_low, shifts = ctx.saved_tensors
    own, loan, weight = ctx.own, ctx.loan, operands[1]
    if own is None:
        own, loan = logps.new_empty(0), weight.new_empty(0)
    if ctx.reuse:
        ctx.own = ctx.loan = None
    wanted = Needs(*ctx.needs_input_grad[:OPERANDS])
    kept = maximum, inverse, unit, unit_low, own, loan, shifts
    backward = linear_token_logps_backward_ if ctx.reuse else linear_token_logps_backward
    found = backward(grad.contiguous(), *operands, targets, logps, *kept, wanted.mask, *ctx.numbers)
    every = list(found)
    if wanted.weight and loan.numel():
        every[1] = loan[: weight.numel()].view(weight.shape)
    every = [part if need else None for part, need in zip(every, wanted, strict=True)]
    return (*every, *(None,) * (1 + len(ctx.numbers)))


linear_token_logps.register_autograd(_gradient, setup_context=_save)
