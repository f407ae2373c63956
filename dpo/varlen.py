"""The variable-length backend: one call over all segments of a packed row, prefix keys gathered.

`varlen_segments` takes the variable-length function as an argument, so that a reference function in plain torch drives
the same tables and windows on the CPU. `default_varlen` picks the installed one: flash-attn's, else torch's.

Shapes: A attention heads, K key-value heads, S packed tokens (queries), L keys of all segments, M segments, D head
dimension.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo.errors import UserError
from dpo.segments import Segments


class VarlenFunction(Protocol):
    """Causal attention aligned at the bottom right: query [S, A, D], key, value [L, K, D], int32 offsets [M + 1] of the
    segments, their largest lengths, scale of the scores, window (keys visible to the left of the diagonal, -1 for all;
    0), soft-cap or None. Returns [S, A, D]."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window: tuple[int, int],
        softcap: float | None,
    ) -> Tensor: ...


def varlen_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    varlen: VarlenFunction,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every segment in one call. query [1, A, S, D], key, value [1, K, S, D]; returns [1, S, A, D].

    window: keys a query sees, itself included (Transformers' `sliding_window`), or None for all.
    """
    # [1, heads, S, D] is a view of the projections' [1, S, heads, D]: transposing back costs nothing
    q, k, v = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))
    if segments.shares:
        k, v = gather_keys(k, segments), gather_keys(v, segments)
    out = varlen(
        q,
        k,
        v,
        segments.cu_seqlens_q,
        segments.cu_seqlens_k,
        segments.max_q,
        segments.max_k,
        scale=scale,
        window=(-1 if window is None else window - 1, 0),
        softcap=softcap,
    )
    return out.unsqueeze(0)


def gather_keys(rows: Tensor, segments: Segments) -> Tensor:
    """rows [S, K, D] (keys or values) to [L, K, D] in the order of the segments, differentiable.

    The backward sums the copies of a prompt row in a fixed order and in at least fp32, without atomics.
    """
    return _GatherKeys.apply(rows, segments)  # pyright: ignore[reportReturnType]


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return rows.index_select(0, segments.key_index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        segments: Segments = ctx.segments
        out = grad.index_select(0, segments.own_key)
        if not segments.shares:
            return out, None
        # the first round holds every prompt row that has copies; later rounds name some of the same rows
        first = segments.rounds[0]
        shared_rows = segments.extra_rows[:first]
        wide = torch.promote_types(grad.dtype, torch.float32)
        total = out.index_select(0, shared_rows).to(wide)
        position = torch.empty(out.shape[0], dtype=torch.int64, device=grad.device)
        position[shared_rows] = torch.arange(first, device=grad.device)
        begin = 0
        for size in segments.rounds:
            copies = slice(begin, begin + size)
            # no row comes twice in a round, so this addition has one order
            target = position.index_select(0, segments.extra_rows[copies])
            total[target] = total.index_select(0, target) + grad.index_select(0, segments.extra_keys[copies])
            begin += size
        out[shared_rows] = total.to(out.dtype)
        return out, None


def default_varlen(softcap: float | None) -> VarlenFunction:
    """flash-attn's function where it is installed, else torch's. Raises UserError for soft-capping with torch's, which
    has none."""
    if importlib.util.find_spec("flash_attn") is not None:
        return flash_varlen
    if softcap is not None:
        raise UserError(
            "attention soft-capping on CUDA needs flash-attn, which is not installed: install it, or use --padded"
        )
    return torch_varlen


def flash_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
) -> Tensor:
    """`flash_attn.flash_attn_varlen_func` as a VarlenFunction."""
    from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        softmax_scale=scale,
        causal=True,
        window_size=window,
        softcap=softcap or 0.0,
    )


def torch_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn` as a VarlenFunction."""
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise UserError("torch's variable-length attention has no soft-capping: install flash-attn, or use --padded")
    out = varlen_attn(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        max_q,
        max_k,
        scale=scale,
        window_size=window,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out
