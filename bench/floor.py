"""The least time a step could take on this machine: its matrix products alone, plus the optimizer's memory traffic.

Counted for the shared layout, with S packed tokens, N completion rows, V vocabulary, H hidden:
- every linear layer of the trunk on S rows: forward twice (policy and reference), dX and dW once;
- the LM head on N rows: forward twice, dH and dW once (plus one forward for tiles that the trainer's plan recomputes);
- attention: per segment and layer scores and values (forward, twice) and four products (backward, once), batched over
  heads, the share of the causal mask only: a product over all of a segment's query-key rectangle is timed and
  multiplied by the fraction of the rectangle that the mask leaves;
- the optimizer: 5 tensors of the parameters' size moved for RMSprop (read p, g, v; write p, v), 7 for AdamW, over the
  bandwidth of a large copy.
Each product is timed alone at its own shape in the step's dtype with warm operands, and the fastest routine at hand
counts: torch's own (`mm`, the BLAS in it for fp32) or oneDNN. Not counted, so part of what is above the floor:
embedding, norms, rotary, activations, softmax, casts, gradient clipping, the loss, packing, Python.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from dpo_kernels.plans import Plan, choose_plan
from torch import Tensor

from bench.our_step import shared_groups, train_config
from bench.workload import Pair, StepSettings
from dpo.inputs import plan_of
from dpo.packing import PackedBatch
from dpo.steps import build_step

OPTIMIZER_TENSORS = {"rmsprop": 5, "adamw": 7}
REPEATS = 3
Timer = Callable[[], float]


@dataclass(frozen=True)
class Floor:
    """Seconds by component, their sum, and the arithmetic behind the matrix products."""

    components: dict[str, float]
    gemm_operations: float

    @property
    def seconds(self) -> float:
        return sum(self.components.values())


class FloorSide:
    """Answers `step(pairs)` with a freshly timed floor of that step."""

    name = "floor"

    def __init__(self, settings: StepSettings, steps: Sequence[Sequence[Pair]]):
        self.settings = settings
        self.dtype = torch.bfloat16 if settings.dtype == "bf16" else torch.float32
        self.plan = plan_of(train_config(settings, "shared"))
        with torch.device("meta"):
            self.parameters = sum(p.numel() for p in settings.model.build().parameters())
        self._copy = (torch.ones(1 << 26), torch.ones(1 << 26))

    def step(self, pairs: Sequence[Pair]) -> Floor:
        groups = shared_groups(pairs)
        batches = [b.batch for b in build_step(groups, range(len(groups)), self.plan).bins]
        parts: dict[str, float] = {}
        operations = 0.0
        with torch.no_grad():
            for batch in batches:
                for name, count, product in self._products(batch):
                    parts[name] = parts.get(name, 0.0) + count * product.seconds(self.settings.timer)
                    operations += count * product.operations
        parts["optimizer traffic"] = self._optimizer_seconds()
        return Floor(parts, operations)

    def _products(self, batch: PackedBatch) -> list[tuple[str, float, "Product"]]:
        """(component, how many times a step, product) of everything that multiplies matrices."""
        shape, dtype = self.settings.model, self.dtype
        tokens, rows = batch.num_tokens, batch.targets.numel()
        narrow = shape.key_value_heads * shape.head_size
        found: list[tuple[str, float, Product]] = []
        linears = ((2, shape.hidden, shape.hidden), (2, shape.hidden, narrow))
        linears += ((2, shape.hidden, shape.intermediate), (1, shape.intermediate, shape.hidden))
        for count, inner, outer in linears:
            times = count * shape.layers
            found.append(("trunk, both forwards", 2 * times, Product(tokens, inner, outer, dtype)))
            found.append(("trunk, dX", times, Product(tokens, outer, inner, dtype, transposed="right")))
            found.append(("trunk, dW", times, Product(outer, tokens, inner, dtype, transposed="both")))
        plan = choose_plan(rows, shape.vocabulary, shape.hidden, dtype, True)
        forwards = 2 + max(0.0, plan.gemms - 3)
        found.append(("head, both forwards", forwards, _tiled(plan, rows, shape.hidden, shape.vocabulary, dtype)))
        backward_h = Product(rows, shape.vocabulary, shape.hidden, dtype, transposed="right")
        found.append(("head, dH", 1, backward_h))
        found.append(("head, dW", 1, Product(shape.vocabulary, rows, shape.hidden, dtype, transposed="both")))
        return found + self._attention(batch)

    def _attention(self, batch: PackedBatch) -> list[tuple[str, float, "Product"]]:
        shape, segments = self.settings.model, batch.segments
        assert segments is not None
        found: list[tuple[str, float, Product]] = []
        spans = zip(segments.q_start, segments.q_stop, segments.prefix_start, segments.prefix_stop, strict=True)
        for q_start, q_stop, prefix_start, prefix_stop in spans:
            q, prefix = q_stop - q_start, prefix_stop - prefix_start
            k = q + prefix
            visible = (prefix + (q + 1) / 2) / k
            scores = Product(q, shape.head_size, k, self.dtype, batch=shape.heads)
            values = Product(q, k, shape.head_size, self.dtype, batch=shape.heads, transposed="right")
            by_key = Product(k, q, shape.head_size, self.dtype, batch=shape.heads, transposed="both")
            for product, forward, backward in ((scores, 2, 1), (values, 2, 1), (by_key, 0, 2)):
                found.append(("attention products", (forward + backward) * shape.layers * visible, product))
        return found

    def _optimizer_seconds(self) -> float:
        source, target = self._copy
        seconds = _best(lambda: target.copy_(source), self.settings.timer)
        bandwidth = 2 * source.nbytes / seconds
        return self.parameters * 4 * OPTIMIZER_TENSORS[self.settings.optimizer] / bandwidth

    def configuration(self) -> dict[str, Any]:
        return {
            "counted": "trunk, head and attention products of the shared layout, each alone; optimizer traffic",
            "routines": ["torch.mm"] + (["oneDNN"] if onednn_linear() else []) + ["torch.bmm (attention)"],
            "repeats": REPEATS,
            "parameters": self.parameters,
        }


@dataclass(frozen=True)
class Product:
    """[rows, inner] @ [inner, columns], `batch` times, operands laid out as the step has them.

    `transposed`: "" for x @ w.T of a forward with w [columns, inner], "right" for g @ w with w [inner, columns], "both"
    for g.T @ x with g [inner, rows].
    """

    rows: int
    inner: int
    columns: int
    dtype: torch.dtype
    batch: int = 1
    transposed: str = ""

    @property
    def operations(self) -> float:
        return 2.0 * self.batch * self.rows * self.inner * self.columns

    def seconds(self, timer: Timer) -> float:
        """The best of a few runs, of the routines that can do it."""
        a = self._operand(self.rows, self.inner, self.transposed == "both")
        b = self._operand(self.inner, self.columns, self.transposed == "")
        if self.batch > 1:
            out = torch.empty(self.batch, self.rows, self.columns, dtype=self.dtype)
            return _best(lambda: torch.bmm(a, b, out=out), timer)
        out = torch.empty(self.rows, self.columns, dtype=self.dtype)
        times = [_best(lambda: torch.mm(a, b, out=out), timer)]
        linear = onednn_linear()
        if linear is not None and self.dtype == torch.float32:
            times.append(_best(lambda: linear(a, b.t()), timer))
            times.append(_best(lambda: linear(a.contiguous(), b.t().contiguous()), timer))
        return min(times)

    def _operand(self, rows: int, columns: int, transposed: bool) -> Tensor:
        shape = (self.batch, columns, rows) if transposed else (self.batch, rows, columns)
        made = torch.randn(shape).to(self.dtype)
        made = made.transpose(1, 2) if transposed else made
        return made[0] if self.batch == 1 else made


@dataclass(frozen=True)
class Tiles:
    """The same product whole and in the trainer's tiles: whichever is faster."""

    whole: Product
    tile: Product
    tiles: int

    @property
    def operations(self) -> float:
        return self.whole.operations

    def seconds(self, timer: Timer) -> float:
        return min(self.whole.seconds(timer), self.tiles * self.tile.seconds(timer))


def _tiled(plan: Plan, rows: int, inner: int, columns: int, dtype: torch.dtype) -> Any:
    tile = Product(plan.row_chunk, inner, plan.vocab_tile, dtype)
    return Tiles(Product(rows, inner, columns, dtype), tile, plan.row_chunks * plan.vocab_tiles)


@lru_cache(1)
def onednn_linear() -> Callable[[Tensor, Tensor], Tensor] | None:
    """a @ b.T through oneDNN in full precision; None where torch lacks it or its own choice is asked for."""
    if os.environ.get("DPO_KERNELS_PRODUCTS") == "torch":
        return None
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        operator(torch.ones(2, 2), torch.ones(2, 2), None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    return lambda a, b: operator(a, b, None, "none", [], "")


def _best(function: Callable[[], object], timer: Timer, repeats: int = REPEATS) -> float:
    function()
    best = float("inf")
    for _ in range(repeats):
        start = timer()
        function()
        best = min(best, timer() - start)
    return best
