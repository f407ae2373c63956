"""Walking a row of the vocabulary with 16-byte accesses, whatever its length and address.

N rows, V vocabulary. A row is `head` elements up to the first 16-byte boundary, a `body` of whole 16-byte words, and
a tail of less than one word. The loops see the body only; head and tail together are one masked tile, touched once
outside the loop.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

WORD = 16
"""Bytes of the widest memory access."""


@dataclass(frozen=True)
class Launch:
    """How one program walks its row: `lanes` threads, each `unroll` words of `vec` elements an iteration."""

    vec: int
    lanes: int
    unroll: int
    warps: int

    @property
    def block(self) -> int:
        return self.vec * self.lanes * self.unroll


def warp_size(device: torch.device) -> int:
    """Threads of a warp: 64 on AMD's data-centre GPUs, else 32."""
    return 64 if device.type == "cuda" and torch.version.hip else 32


def registers(device: torch.device) -> dict[str, int]:
    """Launch option of kernels whose row loop is followed by longer, colder code.

    Left alone, ptxas chooses registers for the occupancy of the loop and spills the rest; 64 still leave 32 warps.
    """
    return {"maxnreg": 64} if warp_size(device) == 32 else {}


def launch_for(dtype: torch.dtype, vocabulary: int, device: torch.device) -> Launch:
    """The launch parameters of the row kernels: a fixed rule on (dtype, V, device), no run-time tuning.

    256 threads and four 16-byte words a thread in flight fill the memory pipe of every supported device (64 KB and
    more a multiprocessor) and keep registers near 40; a vocabulary shorter than such a block takes first fewer words,
    then fewer threads, so that no lane idles through the whole row. AMD's warps have 64 threads, so half as many make
    up 256.
    """
    vec = WORD // dtype.itemsize
    warp = warp_size(device)
    words = triton.cdiv(vocabulary, vec)
    lanes = 256
    while lanes > warp and lanes >= 2 * words:
        lanes //= 2
    unroll = 4
    while unroll > 1 and unroll * lanes >= 2 * words:
        unroll //= 2
    return Launch(vec, lanes, unroll, lanes // warp)


@dataclass(frozen=True)
class Rows:
    """Where the rows of a [..., V] tensor lie: row r starts `r // inner * outer_stride + r % inner * inner_stride`
    in.
    """

    count: int
    inner: int
    outer_stride: int
    inner_stride: int

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.inner, self.outer_stride, self.inner_stride


def rows_of(logits: torch.Tensor) -> tuple[torch.Tensor, Rows]:
    """The tensor and its row geometry; a copy where the last axis is strided or more than two strides are needed."""
    shape, vocabulary = logits.shape[:-1], logits.shape[-1]
    count = shape.numel()
    if logits.stride(-1) != 1 and vocabulary != 1:
        logits = logits.contiguous()
    sizes, strides = [], []
    for size, stride in zip(shape, logits.stride()[:-1], strict=True):
        if size == 1:
            continue
        if sizes and strides[-1] == stride * size:
            sizes[-1], strides[-1] = sizes[-1] * size, stride
        else:
            sizes.append(size)
            strides.append(stride)
    if len(sizes) > 2:
        return rows_of(logits.contiguous())
    inner = sizes[-1] if sizes else 1
    inner_stride = strides[-1] if strides else vocabulary
    outer_stride = strides[0] if len(sizes) == 2 else 0
    return logits, Rows(count, max(inner, 1), outer_stride, inner_stride)


def empty_in_phase(logits: torch.Tensor, phase: int) -> torch.Tensor:
    """An uninitialised tensor of the logits' shape whose rows have the same addresses modulo 16 bytes.

    Contiguous whenever the logits are contiguous and start on a 16-byte boundary. The gradient is written with the
    head, body and tail of the row that it is computed from, which needs equal phases.
    """
    vec = WORD // logits.dtype.itemsize
    strides, extent = [1], logits.shape[-1]
    for size, stride in zip(reversed(logits.shape[:-1]), reversed(logits.stride()[:-1]), strict=True):
        step = extent + (stride - extent) % vec if size != 1 else extent
        strides.append(step)
        extent = step * size
    flat = logits.new_empty(extent + phase)
    return flat.as_strided(logits.shape, tuple(reversed(strides)), phase)


def is_peeled(logits: torch.Tensor, rows: Rows) -> bool:
    """Whether any row starts or ends off a 16-byte boundary."""
    size = logits.dtype.itemsize
    lengths = (logits.shape[-1], rows.outer_stride, rows.inner_stride)
    return logits.data_ptr() % WORD != 0 or any(length * size % WORD for length in lengths)


def phase_of(logits: torch.Tensor) -> int:
    """Elements by which the tensor begins past a 16-byte boundary."""
    return logits.data_ptr() % WORD // logits.dtype.itemsize


@triton.jit
def row_start(row, inner, outer_stride, inner_stride):
    """Offset of a row in elements, in int64."""
    outer = row // inner
    return outer.to(tl.int64) * outer_stride + (row - outer * inner).to(tl.int64) * inner_stride


@triton.jit
def split_row(tensor, start, phase, V, VEC: tl.constexpr, PEEL: tl.constexpr):
    """(pointer to the body, elements of the head, elements of the body) of the row that begins `start` elements in.

    `phase` is how many elements past a 16-byte boundary the tensor begins. The body's offset from that boundary is
    rounded up arithmetically, so that the compiler derives its alignment itself: a hint on the sum would be lost on
    AMD, where offsets are split from pointers.
    """
    first = (start + phase + (VEC - 1)) // VEC * VEC
    head = (first - start - phase).to(tl.int32)
    # A row may end before its first boundary: then it is all head, and the body is empty.
    head = tl.minimum(head, V) if PEEL else 0
    return tl.multiple_of(tensor - phase, 16) + first, head, (V - head) // VEC * VEC


@triton.jit
def peeled_columns(head, body, V, VEC: tl.constexpr, LANES: tl.constexpr):
    """(column, valid) of the head and the tail of a row, on the first 2 * VEC of LANES lanes."""
    lane = tl.arange(0, LANES)
    cols = tl.where(lane < VEC, lane, head + body + lane - VEC)
    valid = tl.where(lane < VEC, lane < head, (lane < 2 * VEC) & (cols < V))
    return cols, valid


@triton.jit
def block_columns(VEC: tl.constexpr, LANES: tl.constexpr, UNROLL: tl.constexpr):
    """Columns of one loop block, [UNROLL, LANES, VEC]: axis 1 runs over threads, so that axes 0 and 2 stay in one
    thread.
    """
    word = tl.arange(0, UNROLL)[:, None, None] * (LANES * VEC)
    return word + tl.arange(0, LANES)[None, :, None] * VEC + tl.arange(0, VEC)[None, None, :]
