"""One call of the LM head: its operands, its fixed arguments, and the memory that lives from forward to backward.

Shapes: N rows, n rows of a chunk, V vocabulary (of this rank's shard), v columns of a tile, H hidden, r rank of LoRA
factors. Kept memory consists of flat tensors whose sizes follow from shapes alone, so that an operator can return them
and a tracer can know them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .common import LogitOptions
from .plans import ALIGN, COLUMNS, Plan, choose_plan, rounded_up


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool
    low: bool
    factor: bool

    @classmethod
    def of(cls, mask: int) -> "Needs":
        return cls(*(bool(mask >> bit & 1) for bit in range(5)))

    @property
    def mask(self) -> int:
        return sum(1 << bit for bit, need in enumerate(self) if need)


@dataclass(frozen=True, slots=True)
class Operands:
    """The tensors of z = hidden @ weight.T + low @ factor.T + bias; hidden and low in the GEMMs' dtype."""

    hidden: Tensor
    """[N, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None
    """[V]"""
    low: Tensor | None
    """[N, r] the rows through LoRA's first factor, scaling included"""
    factor: Tensor | None
    """[V, r] LoRA's second factor"""
    targets: Tensor
    """[N], in this shard's numbering"""

    @property
    def rank(self) -> int:
        return 0 if self.low is None else self.low.shape[1]


@dataclass(frozen=True, slots=True)
class HeadCall:
    """The non-tensor arguments of one call."""

    options: LogitOptions
    stats: tuple[str, ...]
    needs: Needs
    plan: str
    workspace_bytes: int | None
    reuse: bool
    """The backward may destroy what the forward kept."""
    compute: torch.dtype
    """Of the GEMMs."""
    wide: torch.dtype
    """Of log-probs, tiles' arithmetic and accumulation: float32 or float64."""
    backend: str
    group: str
    """Name of the process group over which the vocabulary is sharded, "" for none."""

    @property
    def kept_dtype(self) -> torch.dtype:
        return torch.float32 if self.backend == "triton" else self.compute

    @property
    def in_place(self) -> bool:
        """A kept tile holds exponentials, which only need scaling; otherwise it holds the GEMM's raw output."""
        return self.backend == "torch" and self.compute == self.wide and self.options.softcap is None

    def layout(self, hidden: Tensor, weight: Tensor, low: Tensor | None) -> Plan:
        """The plan for these operands; the sizes may be symbolic."""
        triton, needs = self.backend == "triton", self.needs
        return choose_plan(
            hidden.shape[0],
            weight.shape[0],
            weight.shape[1],
            self.compute,
            needs.weight or needs.bias,
            self.workspace_bytes,
            plan=self.plan,
            hidden_requires_grad=needs.hidden or needs.low,
            weight_grad_dtype=weight.dtype if needs.weight and self.reuse and not triton else None,
            kept_dtype=self.kept_dtype,
            device="cuda" if triton else hidden.device.type,
            lora_rank=0 if low is None else low.shape[1],
            lora_requires_grad=needs.factor,
        )


@dataclass(slots=True)
class Kept:
    """What the forward leaves for the backward beside its operands. Sizes: `Kept.allocate`."""

    plan: Plan
    maximum: Tensor
    """[N] over the whole vocabulary"""
    inverse: Tensor
    """[N] 1 / sum exp(x - maximum), 0 where ignored"""
    unit: Tensor
    """[N, H] d lp / d hidden of this shard (frozen plan), or empty"""
    unit_low: Tensor
    """[N, r] d lp / d low of this shard (frozen plan), or empty"""
    own: Tensor
    """[tiles * slot] kept tiles, or empty"""
    loan: Tensor
    """In the weight's dtype: the gradient [V, H], its last tile filled up, and one more tile; or empty.

    Tile k's kept logits lie one tile further than its gradient, so writing gradients in order only ever overwrites
    tiles that are used up.
    """
    shifts: Tensor
    """[tiles of the vocabulary, N] the maximum that a kept tile's exponentials are relative to, or empty"""

    @classmethod
    def allocate(cls, plan: Plan, call: HeadCall, hidden: Tensor, weight: Tensor, low: Tensor | None) -> "Kept":
        rows, columns = hidden.shape[0], -(-plan.vocabulary // plan.vocab_tile)
        frozen = plan.name == "frozen"
        shapes: list[tuple[Sequence[int], torch.dtype]] = [
            ((rows,), call.wide),
            ((rows,), call.wide),
            ((rows, hidden.shape[1]) if frozen else (0,), call.wide),
            ((rows, low.shape[1]) if frozen and low is not None else (0,), call.wide),
            (((plan.retained - plan.lent) * plan.slot,), call.kept_dtype),
            (((columns + 1) * plan.vocab_tile * weight.shape[1] + 2 * ALIGN if plan.lent else 0,), weight.dtype),
            ((columns, rows) if plan.retained and call.in_place else (0, 0), call.wide),
        ]
        return cls(plan, *(torch.empty(shape, dtype=dtype, device=hidden.device) for shape, dtype in shapes))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.maximum, self.inverse, self.unit, self.unit_low, self.own, self.loan, self.shifts

    def keeps(self, k: int, c: int) -> bool:
        return self.plan.tile_index(k, c) < self.plan.retained

    def tile(self, k: int, c: int, rows: int, columns: int, *, padded: bool = False) -> Tensor:
        """[n, v] where tile k of row chunk c is kept; `padded`: every row starts on a 16-byte boundary."""
        plan, dtype = self.plan, self.own.dtype
        index = plan.tile_index(k, c)
        if index < plan.lent:
            slot = rounded_up(plan.slot * dtype.itemsize, ALIGN)
            tile = (self.loan.numel() - 2 * ALIGN) * self.loan.dtype.itemsize // (plan.vocab_tiles + 1)
            start = rounded_up(k * tile, ALIGN) + rounded_up(tile, ALIGN) + c * slot
            memory = self.loan.view(torch.uint8)[start : start + plan.slot * dtype.itemsize].view(dtype)
        else:
            memory = self.own[(index - plan.lent) * plan.slot : (index - plan.lent + 1) * plan.slot]
        stride = rounded_up(columns, COLUMNS) if padded else columns
        return memory[: rows * stride].view(rows, stride)[:, :columns]

    def gradient(self, weight: Tensor) -> Tensor:
        """dL/dweight [V, H] to be written: in lent memory where there is some."""
        if self.loan.numel():
            return self.loan[: weight.numel()].view(weight.shape)
        return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


@dataclass(slots=True)
class Buffers:
    """Scratch of one pass, allocated once and reused by every tile."""

    device: torch.device
    held: dict[str, Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous view of the buffer `name`; its contents are arbitrary."""
        size = math.prod(shape)
        flat = self.held.get(name)
        if flat is None or flat.numel() < size:
            flat = self.held[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    def padded(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] of the buffer `name`, every row on a 16-byte boundary."""
        return self.get(name, (rows, rounded_up(columns, COLUMNS)), dtype)[:, :columns]

    def cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor itself where it has that dtype, else its copy in the buffer `name`."""
        return tensor if tensor.dtype == dtype else self.get(name, tensor.shape, dtype).copy_(tensor)
