"""linear_token_logps: log-probs through the LM head, without [N, V] logits beyond the workspace.

Shapes: N rows, V vocabulary, H hidden, r rank of LoRA factors. Here: arguments and the part that plain autograd does;
the operator is in `head_operators.py`, the work on tiles in `head_torch.py` and `tri/head.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from . import head_operators, sharding
from .backends import resolve_backend
from .common import (
    STATS,
    LogitOptions,
    TokenStats,
    check_float,
    check_index,
    check_same_device,
    check_shape,
    check_stats,
)
from .storage import Needs


class LoraFactors(NamedTuple):
    """A low-rank addition to the LM head (Hu et al. 2021, arXiv:2106.09685): W + scaling * b @ a.

    Several adapters at once: factors side by side, `LoraFactors(cat([a1 * s1, a2 * s2]), cat([b1, b2], 1))`.
    """

    a: Tensor
    """[r, H]"""
    b: Tensor
    """[V, r]; of a sharded vocabulary, this rank's rows"""
    scaling: float = 1.0


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on (float64 keeps its own, as everywhere in autocast), else the wider input's."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return dtype


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora: LoraFactors | None,
    targets: Tensor,
    ignore_index: int,
    *,
    sharded: bool,
) -> Tensor:
    """targets as int64; ValueError names what does not fit. A shard's targets are checked once its place is known."""
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
    if lora is not None:
        check_float("lora.a", lora.a)
        check_float("lora.b", lora.b)
        if lora.a.dim() != 2:
            raise ValueError(f"lora.a: expected shape [r, H], found {list(lora.a.shape)}")
        check_shape("lora.a", lora.a, (lora.a.shape[0], hidden.shape[1]), "[r, H] with hidden's H")
        check_shape("lora.b", lora.b, (weight.shape[0], lora.a.shape[0]), "[V, r] with lora.a's r")
        check_same_device(hidden=hidden, lora_a=lora.a, lora_b=lora.b)
    check_shape("targets", targets, hidden.shape[:1], "one a row of hidden")
    check_same_device(hidden=hidden, weight=weight, bias=bias, targets=targets)
    return check_index("targets", targets, None if sharded else weight.shape[0], allow=ignore_index)


def _low_rank(hidden: Tensor, lora: LoraFactors, compute: torch.dtype) -> Tensor:
    """[N, r] scaling * hidden @ a.T in the GEMMs' dtype; its autograd is torch's own."""
    with torch.autocast(hidden.device.type, enabled=False):
        wide = torch.promote_types(lora.a.dtype, torch.float32)
        return F.linear(hidden.to(compute), (lora.a.to(wide) * lora.scaling).to(compute))


class HeadArguments(TypedDict, total=False):
    """Keyword arguments of `linear_token_logps` beside `stats`, for its overloads."""

    bias: Tensor | None
    ignore_index: int
    temperature: float
    logit_scale: float
    softcap: float | None
    lora: LoraFactors | tuple[Tensor, Tensor, float] | None
    plan: str
    workspace_bytes: int | None
    process_group: ProcessGroup | str | None
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
    lora: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
    plan: str = "auto",
    workspace_bytes: int | None = None,
    process_group: ProcessGroup | str | None = None,
    stats: Sequence[str] = (),
    backend: str | None = None,
) -> Tensor | TokenStats:
    """log softmax(x)[target], x = cap(logit_scale * z) / temperature, z = hidden @ (weight + scaling * b @ a).T + bias.

    hidden [N, H], weight [V, H], bias [V] or None, in any floating dtypes; targets [N] in [0, V) or `ignore_index`;
    lora (a [r, H], b [V, r], scaling) or None. Returns [N] in fp32 (float64 where hidden or weight is float64), 0 where
    ignored; with `stats`, `TokenStats`. GEMMs run in autocast's dtype where autocast is on, else in the wider of
    hidden's and weight's. Gradients for hidden, weight, bias, a and b, each where required, in their dtypes; those of
    the weight accumulate in fp32. `plan` and `workspace_bytes` are `choose_plan`'s; a row's log-prob is bitwise the
    same for every plan, with and without gradient.

    process_group (or its name): the vocabulary is sharded over it; weight, bias and b are this rank's rows, in rank
    order, uneven as they may be. hidden and targets, in the whole vocabulary's numbering, are the same on every rank,
    and so must be what is done with the result: gradients of hidden and a are whole on every rank.

    ValueError names a bad argument.
    """
    factors = None if lora is None else LoraFactors(*lora)
    group = sharding.name_of(process_group)
    targets = _check(hidden, weight, bias, factors, targets, ignore_index, sharded=bool(group))
    compute = _compute_dtype(hidden, weight)
    dtypes = [part.dtype for part in (hidden, weight, bias) if part is not None] + [compute]
    chosen_backend = resolve_backend(backend, hidden.device, *dtypes)
    options, names = LogitOptions(ignore_index, temperature, logit_scale, softcap), check_stats(stats)
    if workspace_bytes is not None and workspace_bytes < 0:
        raise ValueError(f"workspace_bytes: expected 0 or more, found {workspace_bytes}")
    low = None if factors is None else _low_rank(hidden, factors, compute)
    operands = hidden, weight, bias, low, None if factors is None else factors.b
    grad = torch.is_grad_enabled()
    needs = Needs(*(grad and part is not None and part.requires_grad for part in operands))
    shaping = ignore_index, options.temperature, options.logit_scale, options.softcap or 0.0
    mask = sum(1 << STATS.index(name) for name in set(names))
    memory = plan, -1 if workspace_bytes is None else workspace_bytes, not torch.compiler.is_compiling()
    logps, found, *_ = head_operators.linear_token_logps(
        *operands, targets, needs.mask, *shaping, mask, *memory, compute, chosen_backend, group
    )
    if not names:
        return logps
    ordered = [name for name in STATS if name in names]
    values = dict(zip(ordered, found.unbind(), strict=True))
    if "max_is_target" in values:
        values["max_is_target"] = values["max_is_target"] != 0
    return TokenStats(logps, **values)
