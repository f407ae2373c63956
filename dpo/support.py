"""What cannot be packed, or not be trained at all, and how it is told: by name, with the flag that helps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dpo.errors import UserError
from dpo.packing import Layout, PackedBatch

_STATE_SPACE = re.compile(
    r"mamba|rwkv|deltanet|linearattention|recurrent|shortconv|ssm|s4d|xlstm|retention", re.IGNORECASE
)
_PLAIN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_LENGTH_DEPENDENT_ROPE = {"longrope", "dynamic"}


def refuse_unsupported(model: PreTrainedModel, layout: Layout) -> None:
    """Raise UserError for a model that `layout` would compute inexactly, naming what it has and the flag to use
    instead."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name}: expected a causal language model, found an encoder-decoder")
    if not_causal := _bidirectional(model, config):
        raise UserError(f"{name}: expected a causal language model, found {not_causal}")
    if layout == "padded":
        return
    for reason in _unpackable(model, config):
        raise UserError(f"{name} has {reason}, which a packed row would compute wrongly: use --padded")


def refuse_lengths(model: PreTrainedModel, batch: PackedBatch) -> None:
    """Raise UserError when rotary scaling that depends on the length (longrope, dynamic) would differ between the rows
    of the batch.

    Transformers chooses the factors from the largest position of the whole batch, so all sequences must be on one side.
    """
    config = model.config.get_text_config(decoder=True)
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type")
        if kind not in _LENGTH_DEPENDENT_ROPE:
            continue
        short, long = batch.sequence_lengths
        limit = config.max_position_embeddings
        if kind == "longrope":
            limit = rope.get("original_max_position_embeddings") or limit
        # dynamic scaling also remembers the longest batch so far
        if long > limit and (kind == "dynamic" or short <= limit):
            raise UserError(
                f"{type(model).__name__} has rotary scaling {kind!r}, which changes at {limit} tokens, and one batch "
                f"holds sequences of {short} and {long}: keep prompt and completion within {limit} tokens with "
                "--max-prompt-length and --max-completion-length"
            )


def _bidirectional(model: PreTrainedModel, config: Any) -> str | None:
    if getattr(config, "is_causal", True) is False:
        return "is_causal=False"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "bidirectional attention (use_bidirectional_attention)"
    if getattr(config, "prefix_lm", False) or getattr(config, "is_prefix_lm", False):
        return "prefix-LM attention"
    for path, module in model.named_modules():
        if getattr(module, "is_causal", True) is False:
            return f"bidirectional attention in {path} ({type(module).__name__})"
    return None


def _unpackable(model: PreTrainedModel, config: Any) -> Iterator[str]:
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        yield "ALiBi position biases"
    for path, module in model.named_modules():
        if _STATE_SPACE.search(type(module).__name__) and not isinstance(module, PreTrainedModel):
            yield f"state-space or linear attention layers ({type(module).__name__} in {path})"
        if any(isinstance(getattr(module, sink, None), nn.Parameter) for sink in ("sinks", "attention_sink_bias")):
            yield f"attention sinks ({type(module).__name__} in {path})"
        if "relative_attention_bias" in dict(module.named_children()):
            yield f"relative position biases ({type(module).__name__} in {path})"
    layers = set(getattr(config, "layer_types", None) or ()) - _PLAIN_LAYERS
    if layers:
        yield f"{' and '.join(sorted(layers))} layers"
    if not model._supports_attention_backend:
        yield "attention that does not go through Transformers' attention interface"


def _rope_parameters(config: Any) -> list[dict[str, Any]]:
    rope = getattr(config, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
