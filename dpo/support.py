"""What cannot be packed, or not be trained at all, and how it is told: by name, with the flag that helps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from dpo.errors import UserError
from dpo.packing import Layout, PackedBatch

_STATE_SPACE = re.compile(
    r"mamba|rwkv|deltanet|linearattention|recurrent|shortconv|ssm(?!lp)|s4d|xlstm|retention", re.IGNORECASE
)
_RANDOM_ROUTING = {"phimoe": "experts drawn at random in training"}
_ATTENTION_DROPOUT = re.compile(r"att.*(drop|pdrop)")
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
    if config.model_type in _RANDOM_ROUTING:
        raise UserError(
            f"{name} has {_RANDOM_ROUTING[config.model_type]}: no forward repeats, so no log ratio is exact"
        )
    if layout == "padded":
        return
    for reason in _unpackable(model, config):
        raise UserError(f"{name} has {reason}, which a packed row would compute wrongly: use --padded")


def refuse_dropout(model: PreTrainedModel, layout: Layout) -> None:
    """Raise UserError for dropout on attention weights, which a packed row cannot apply."""
    config = model.config.get_text_config(decoder=True)
    for field, value in vars(config).items():
        if layout != "padded" and _ATTENTION_DROPOUT.search(field) and isinstance(value, float) and value > 0:
            raise UserError(
                f"--dropout: {type(model).__name__} drops attention weights ({field} {value:g}), which a packed row "
                "cannot: use --padded, or leave --dropout off"
            )


def length_limit(model: PreTrainedModel) -> int | None:
    """Tokens up to which the model's `longrope` scaling takes its short factors, or None without it.

    Transformers chooses the factors from the largest position of a whole batch: sequences on both sides of the limit
    must not share a bin.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [_limit_of(rope, config) for rope in _rope_parameters(config) if rope.get("rope_type") == "longrope"]
    return min(limits, default=None)


def refuse_data(model: PreTrainedModel, lengths: Iterable[int], name: str) -> None:
    """Raise UserError when a sequence of the data is longer than `dynamic` rotary scaling allows in a batch.

    lengths: tokens of the longest sequence of every group. name: the flag that errors name.
    """
    config = model.config.get_text_config(decoder=True)
    for rope in _rope_parameters(config):
        limit, longest = _limit_of(rope, config), max(lengths, default=0)
        if rope.get("rope_type") == "dynamic" and longest > limit:
            raise UserError(
                f"{name}: {type(model).__name__} has rotary scaling 'dynamic', which changes with the longest sequence "
                f"of a batch beyond {limit} tokens: expected prompt and completion within {limit}, found {longest}: "
                "lower --max-prompt-length or --max-completion-length"
            )


def _limit_of(rope: dict[str, Any], config: Any) -> int:
    original = rope.get("original_max_position_embeddings") if rope.get("rope_type") == "longrope" else None
    return original or config.max_position_embeddings


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
        limit = _limit_of(rope, config)
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
