"""How the LM head's work is laid out: which of the three exact plans, tile sizes, and how many tiles are kept.

Shapes: N rows, V vocabulary, H hidden. A GEMM is 2 N V H operations.
- frozen, 2 GEMMs: the head needs no gradient, so d lp_t / d h_t is computed in the forward and only scaled later;
- retain, 3 GEMMs: logits tiles kept from the forward become gradients in the backward;
- recompute, 4 GEMMs: logits tiles are computed again. Retain and recompute mix freely, tile by tile;
- score, 1 GEMM: nothing needs a gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

PLANS = ("auto", "frozen", "retain", "recompute")
WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
"""Default workspace budget of a device type."""

ALIGN = 64
"""Bytes to which kept tiles are aligned, as allocations are."""

COLUMNS = 16
"""Elements to which tiles' widths and leading dimensions are rounded up: 16-byte boundaries in every dtype."""

TILE_ROWS = 512
TILE_ELEMENTS = 1 << 20
"""Of one tile: 4 MB of fp32, which the cores' L2 and a share of L3 hold, and long enough for the GEMM's full rate."""

GPU_TILE = (4096, 1 << 22)
"""Rows and elements of a tile on a GPU: 16 MB of fp32 beside its 8 MB gradient stay in 50 MB of L2, and one wave of
blocks.
"""

RATES = {
    ("cpu", torch.float32): (8e10, 2e10),
    ("cpu", torch.float64): (4e10, 2e10),
    ("cpu", torch.bfloat16): (2e11, 2e10),
    ("cpu", torch.float16): (1e11, 2e10),
    ("cuda", torch.float32): (5e13, 2e12),
    ("cuda", torch.float64): (3e13, 2e12),
    ("cuda", torch.bfloat16): (5e14, 2e12),
    ("cuda", torch.float16): (5e14, 2e12),
}
"""GEMM operations a second and memory bytes a second, in round figures: only their ratio matters."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One layout of the work."""

    name: str
    """frozen, retain, recompute or score."""
    rows: int
    vocabulary: int
    row_chunk: int
    vocab_tile: int
    slot: int
    """Elements of one kept tile's memory."""
    retained: int
    """Tiles kept, in the order of `tile_index` (row chunk by row chunk)."""
    lent: int
    """How many of these, the first ones, live in memory that the weight's gradient will overwrite."""
    workspace_bytes: int
    """Kept between forward and backward: at most the budget."""
    tile_bytes: int
    """Working set of one tile: comes on top of the workspace."""
    gemms: float
    """GEMMs of the whole size, forward and backward, that the plan does."""
    seconds: float
    """The cost model's estimate."""

    @property
    def vocab_tiles(self) -> int:
        return -(-self.vocabulary // self.vocab_tile)

    @property
    def row_chunks(self) -> int:
        return -(-self.rows // self.row_chunk)

    def columns(self) -> Iterator[tuple[int, int, int]]:
        """(k, start, stop) of every vocabulary tile."""
        for k, start in enumerate(range(0, self.vocabulary, self.vocab_tile)):
            yield k, start, min(start + self.vocab_tile, self.vocabulary)

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(c, start, stop) of every row chunk; one empty chunk where there are no rows."""
        for c, start in enumerate(range(0, max(self.rows, 1), self.row_chunk)):
            yield c, start, min(start + self.row_chunk, self.rows)

    def tile_index(self, k: int, c: int) -> int:
        return c * self.vocab_tiles + k

    def for_rows(self, rows: int) -> "Plan":
        """The same layout of memory for fewer rows, which their chunks share evenly."""
        chunks = max(1, -(-rows // self.row_chunk))
        tiles = chunks * self.vocab_tiles
        return replace(
            self,
            rows=rows,
            row_chunk=max(1, -(-rows // chunks)),
            retained=min(self.retained, tiles),
            lent=min(self.lent, tiles),
        )


def larger(a: int, b: int) -> int:
    """max, without a branch on symbolic sizes."""
    return torch.sym_max(a, b)  # pyright: ignore[reportReturnType]


def smaller(a: int, b: int) -> int:
    return torch.sym_min(a, b)  # pyright: ignore[reportReturnType]


def rounded_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def tile_shape(rows: int, vocabulary: int, device: str = "cpu") -> tuple[int, int]:
    """(row chunk, vocabulary tile), the same for every plan: a row's log-prob never depends on the plan.

    Like everything here that sizes memory, free of branches on `rows`, which is symbolic under `torch.compile`.
    """
    most_rows, elements = GPU_TILE if device == "cuda" else (TILE_ROWS, TILE_ELEMENTS)
    chunks = larger(1, -(-rows // most_rows))
    row_chunk = larger(1, -(-rows // chunks))
    tiles = larger(1, (2 * vocabulary * row_chunk + elements) // (2 * elements))
    return row_chunk, smaller(vocabulary, rounded_up(-(-vocabulary // tiles), COLUMNS))


def lent_chunks(slot: int, vocab_tile: int, hidden: int, dtype: torch.dtype, grad_dtype: torch.dtype) -> int:
    """Row chunks of a vocabulary tile that fit into the memory of its weight gradient: H rows where dtypes agree."""
    region = vocab_tile * hidden * grad_dtype.itemsize // ALIGN
    return region // (rounded_up(slot * dtype.itemsize, ALIGN) // ALIGN)


def choose_plan(
    rows: int,
    vocabulary: int,
    hidden: int,
    dtype: torch.dtype,
    weight_requires_grad: bool,
    workspace_bytes: int | None = None,
    *,
    plan: str = "auto",
    hidden_requires_grad: bool = True,
    weight_grad_dtype: torch.dtype | None = None,
    kept_dtype: torch.dtype | None = None,
    device: str = "cpu",
    lora_rank: int = 0,
    lora_requires_grad: bool = False,
) -> Plan:
    """The plan for N rows, V, H with GEMMs in `dtype`; "auto" takes the cheapest by the cost model.

    `workspace_bytes` bounds what is kept between forward and backward (retained tiles, or the frozen plan's [N, H]). A
    forced "retain" keeps as many tiles as fit; a forced "frozen" is refused where the head (weight or bias) needs a
    gradient, or [N, H] does not fit. `weight_grad_dtype`, where the weight has a gradient, says that its memory is
    allocated in the forward already and holds kept tiles until it is written: they cost no workspace. `kept_dtype` is
    that of kept tiles (the GEMMs' where None). `lora_rank` r adds the factors' products, each r / H of a GEMM;
    `lora_requires_grad` says that the factor B [V, r] needs a gradient, which weighs rows by the loss and so excludes
    "frozen". ValueError names the argument.
    """
    if plan not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(PLANS)}, found {plan!r}")
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(device, WORKSPACE_BYTES["cuda"])
    if workspace_bytes < 0:
        raise ValueError(f"workspace_bytes: expected 0 or more, found {workspace_bytes}")
    rate, bandwidth = RATES.get((device, dtype), RATES[("cuda", torch.bfloat16)])
    row_chunk, vocab_tile = tile_shape(rows, vocabulary, device)
    tile, slot = row_chunk * vocab_tile, rounded_up(row_chunk * rounded_up(vocab_tile, COLUMNS), 2 * COLUMNS)
    wide = 8 if dtype == torch.float64 else 4
    columns = -(-vocabulary // vocab_tile)
    gemm = 2.0 * rows * vocabulary * hidden / rate
    low_rank = lora_rank / max(hidden, 1)
    # logits in the GEMM's dtype, widened, rounded, or a copy that the vendor's GEMM transposes; a weight tile in the
    # GEMM's dtype; a dW tile; [n, H] of a dH product
    copies = 2 * dtype.itemsize if dtype.itemsize < 4 else dtype.itemsize
    tile_bytes = tile * (wide + copies) + vocab_tile * hidden * (wide + 4)
    # beside [n, H], the factors' [n, r], their tiles widened, and their gradients before rounding
    tile_bytes += row_chunk * hidden * wide + (2 * row_chunk + 2 * rows + vocab_tile + vocabulary) * lora_rank * wide

    def layout(name: str, retained: int, kept: int, gemms: float, moved: float, lent: int = 0) -> Plan:
        seconds = gemms * gemm + moved / bandwidth
        # Lent memory is up to two weight tiles longer than the gradient; the lent tiles' maxima are kept beside it.
        longer = (columns + 1) * vocab_tile - vocabulary
        beside = (longer * hidden + 2 * ALIGN) * 4 + lent * row_chunk * wide if lent else 0
        sizes = rows, vocabulary, row_chunk, vocab_tile, slot, retained, lent, kept
        return Plan(name, *sizes, tile_bytes + beside, gemms, seconds)

    forward = 1.0 + low_rank
    backward = float(weight_requires_grad) + hidden_requires_grad * (1.0 + low_rank) + lora_requires_grad * low_rank
    if not (weight_requires_grad or hidden_requires_grad or lora_requires_grad):
        return layout("score", 0, 0, forward, 0.0)
    tiles = larger(1, -(-rows // row_chunk) * columns)
    each = slot * (kept_dtype or dtype).itemsize + row_chunk * wide
    lent = 0
    if weight_grad_dtype is not None:
        lent = smaller(tiles, lent_chunks(slot, vocab_tile, hidden, dtype, weight_grad_dtype) * columns)
    own = smaller(tiles - lent, workspace_bytes // each)
    fit = lent + own
    candidates = {
        "retain": layout("retain", fit, own * each, forward * (2 - fit / tiles) + backward, 2.0 * fit * each, lent),
        "recompute": layout("recompute", 0, 0, 2 * forward + backward, 0.0),
    }
    frozen_bytes = rows * (hidden + lora_rank) * wide
    trained = weight_requires_grad or lora_requires_grad
    if not trained and frozen_bytes <= workspace_bytes:
        candidates["frozen"] = layout("frozen", 0, frozen_bytes, 2 * forward, 3.0 * frozen_bytes)
    if plan == "frozen" and "frozen" not in candidates:
        if trained:
            what = "weight or bias" if weight_requires_grad else "LoRA factor b"
            raise ValueError(f"plan: 'frozen' needs a head without gradient, found {what} that requires grad")
        raise ValueError(f"workspace_bytes: plan 'frozen' needs {frozen_bytes}, found {workspace_bytes}")
    if plan != "auto":
        return candidates[plan]
    return min(candidates.values(), key=lambda candidate: candidate.seconds)
