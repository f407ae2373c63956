"""Attention over a packed row, as an attention function of Transformers (`AttentionInterface`, name `dpo_segments`).

The row's layout travels as `segments=` of `model(...)`. A segment's queries attend to its prefix rows and to its own
rows, causally; sliding windows and soft-capping are what the layer asks for. Two backends share the layout:
- CPU: one fused attention call a segment, inside one autograd function (below: why);
- CUDA: one variable-length call over all segments, prefix keys gathered (`dpo.varlen`); in fp32, which those kernels
  lack, plain attention segment by segment.

No mask function is registered for the name: Transformers then builds no mask at all (and does not search position ids
for packed sequences, which would wait for the device).

Shapes: A attention heads, K key-value heads, S packed tokens, D head dimension, q and k queries and keys of one
segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from dpo.errors import PackingError, UserError
from dpo.segments import Segments

ATTENTION = "dpo_segments"


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function. query [1, A, S, D], key, value [1, K, S, D]; returns ([1, S, A, D], None).

    Raises RuntimeError when `segments` did not reach the layer, and UserError for what cannot be computed exactly.
    """
    if segments is None:
        raise PackingError(
            f"attention {ATTENTION!r}: `segments` did not reach {type(module).__name__}: use --padded (in a loop of "
            "your own: call the model with segments=batch.segments, or select another attention)"
        )
    _check_call(module, query, attention_mask, dropout, segments, kwargs)
    segments.cache["calls"] = segments.cache.get("calls", 0) + 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    width = value.shape[-1]
    if width != query.shape[-1]:
        # latent attention: the kernels want one head size, and zeros change neither scores nor what is summed
        query, key, value = _same_width(query, key, value)
    if query.is_cuda:
        return _cuda_segments(query, key, value, segments, scale, sliding_window, softcap)[..., :width], None
    # the CPU's bf16 flash backward takes 3.5 times as long as its fp32 one (and under autocast rotary leaves q and k in
    # fp32 anyway)
    wide = torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    narrow = value.dtype
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if softcap is not None:
        out = eager_segments(query, key, value, segments, scale, sliding_window, softcap)
    else:
        out = flash_segments(query, key, value, segments, scale, sliding_window)
    return out[..., :width].to(narrow), None


def _same_width(*tensors: Tensor) -> list[Tensor]:
    """The tensors with zeros behind the last dimension, up to the widest."""
    widest = max(tensor.shape[-1] for tensor in tensors)
    return [torch.nn.functional.pad(tensor, (0, widest - tensor.shape[-1])) for tensor in tensors]


def _cuda_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """The variable-length kernels, which compute in half precision; fp32 and float64 take the plain path, exactly."""
    from dpo.varlen import default_varlen, varlen_segments

    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.dtype not in (torch.bfloat16, torch.float16):
        return eager_segments(query, key, value, segments, scale, window, softcap)
    return varlen_segments(query, key, value, segments, default_varlen(softcap), scale, window, softcap)


def _check_call(
    module: torch.nn.Module,
    query: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    segments: Segments,
    kwargs: dict[str, Any],
) -> None:
    name = type(module).__name__
    if query.shape[0] != 1 or query.shape[2] != segments.q_stop[-1]:
        raise RuntimeError(
            f"{name}: expected queries of one packed row of {segments.q_stop[-1]} tokens, "
            f"found {query.shape[0]} rows of {query.shape[2]}"
        )
    if attention_mask is not None:
        raise PackingError(
            f"{name}: expected no attention mask beside `segments`, found one of shape {tuple(attention_mask.shape)}: "
            "use --padded"
        )
    if dropout:
        raise UserError(f"{name}: attention dropout {dropout} cannot be packed: set it to 0, or use --padded")
    for option in ("s_aux", "position_bias", "indexer_topk", "learnable_sink"):
        if kwargs.get(option) is not None:
            raise UserError(f"{name}: attention with `{option}` cannot be packed: use --padded")


def flash_segments(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None = None
) -> Tensor:
    """Attention of every segment on the CPU. query [1, A, S, D], key, value [1, K, S, D] of one dtype; returns [1, S,
    A, D]."""
    return _FlashSegments.apply(query, key, value, segments, scale, window)  # pyright: ignore[reportReturnType]


class _FlashSegments(torch.autograd.Function):
    """The CPU flash kernel once a segment.

    One function for the whole row because autograd's backward of every slice of q, k and v is a zero-filled tensor of
    the whole row plus an addition: with two slices a group that costs more than the attention itself.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None
    ) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3])
        lse = []
        for index in range(len(segments.q_start)):
            q, k, v, causal, mask = _operands(query, key, value, segments, index, window)
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, causal, attn_mask=mask, scale=scale
            )
            out[:, segments.q_start[index] : segments.q_stop[index]] = part.transpose(1, 2)
            lse.append(part_lse)
        ctx.save_for_backward(query, key, value, out, *lse)
        ctx.segments, ctx.scale, ctx.window = segments, scale, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        query, key, value, out, *lse = ctx.saved_tensors
        segments: Segments = ctx.segments
        out, grad_out = out.transpose(1, 2), grad_out.transpose(1, 2)
        # [1, S, heads, D] in memory like the projections that made q, k and v, so that their backward needs no copy
        grad_q, grad_k, grad_v = (torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (query, key, value))
        prefix_parts = []
        for index, part_lse in enumerate(lse):
            q, k, v, causal, mask = _operands(query, key, value, segments, index, ctx.window)
            rows = slice(segments.q_start[index], segments.q_stop[index])
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_out[:, :, rows], q, k, v, out[:, :, rows], part_lse, 0.0, causal, attn_mask=mask, scale=ctx.scale
            )
            grad_q[:, :, rows] = dq
            prefix = segments.prefix_stop[index] - segments.prefix_start[index]
            grad_k[:, :, rows] = dk[:, :, prefix:]
            grad_v[:, :, rows] = dv[:, :, prefix:]
            if prefix:
                prefix_parts.append(
                    (
                        slice(segments.prefix_start[index], segments.prefix_stop[index]),
                        dk[:, :, :prefix],
                        dv[:, :, :prefix],
                    )
                )
        for rows, dk, dv in prefix_parts:
            grad_k[:, :, rows] += dk
            grad_v[:, :, rows] += dv
        return grad_q, grad_k, grad_v, None, None, None


def _operands(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, index: int, window: int | None
) -> tuple[Tensor, Tensor, Tensor, bool, Tensor | None]:
    """q, k, v of one segment, whether the kernel's own causal mask does, else the additive mask."""
    rows = slice(segments.q_start[index], segments.q_stop[index])
    prefix = slice(segments.prefix_start[index], segments.prefix_stop[index])
    q, k, v = query[:, :, rows], key[:, :, rows], value[:, :, rows]
    if prefix.stop > prefix.start:
        k = torch.cat((key[:, :, prefix], k), dim=2)
        v = torch.cat((value[:, :, prefix], v), dim=2)
    causal = prefix.stop == prefix.start and (window is None or window >= k.shape[2])
    return q, k, v, causal, None if causal else segment_mask(segments, index, window, query)


def segment_mask(segments: Segments, index: int, window: int | None, like: Tensor) -> Tensor:
    """Additive mask [q, k] of one segment (0 or -inf) in the dtype and on the device of `like`, cached in the
    layout."""
    keys = segments.q_stop[index] - segments.q_start[index] + segments.prefix_stop[index] - segments.prefix_start[index]
    window = None if window is None or window >= keys else window
    cache_key = (index, window, like.dtype, like.device)
    mask = segments.cache.get(cache_key)
    if mask is None:
        queries = segments.q_stop[index] - segments.q_start[index]
        behind = torch.arange(keys - queries, keys, device=like.device)[:, None] - torch.arange(
            keys, device=like.device
        )
        hidden = behind < 0 if window is None else (behind < 0) | (behind >= window)
        mask = torch.zeros_like(hidden, dtype=like.dtype).masked_fill_(hidden, -torch.inf)
        segments.cache[cache_key] = mask
    return mask


def eager_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Plain attention of every segment, with soft-capping. Shapes as `flash_segments`; any dtype, softmax in at least
    fp32."""
    groups = query.shape[1] // key.shape[1]
    softmax_dtype = torch.promote_types(query.dtype, torch.float32)
    outputs = []
    for index in range(len(segments.q_start)):
        q, k, v, _, _ = _operands(query, key, value, segments, index, window)
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(-1, -2) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + segment_mask(segments, index, window, scores)
        weights = scores.softmax(dim=-1, dtype=softmax_dtype).to(q.dtype)
        outputs.append((weights @ v).transpose(1, 2))
    return torch.cat(outputs, dim=1)


AttentionInterface.register(ATTENTION, segment_attention)
