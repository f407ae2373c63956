"""The causal LM as a trunk and a head: make it ready for a layout and run it on a batch.

Shapes: B, S rows and tokens of a batch, N completion tokens, H hidden, V vocabulary, C completions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from dpo_kernels import linear_token_logps
from dpo_kernels.scaling import logit_scaling
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.adapters import head_parts
from dpo.attention import ATTENTION
from dpo.cpu import use_fast_products
from dpo.errors import PackingError, UserError
from dpo.load import eos_token_ids, load_model, load_tokenizer
from dpo.packing import Layout, PackedBatch
from dpo.parallel import inside
from dpo.support import refuse_lengths, refuse_unsupported

__all__ = [
    "Head",
    "LogPs",
    "decoder_of",
    "eos_token_ids",
    "head_logps",
    "head_of",
    "load_model",
    "load_tokenizer",
    "prepare",
    "shared_logps",
    "stock_attention",
    "trunk",
]


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head: logits = cap(logit_scale * (hidden @ weight.T + bias)), cap(z) = softcap * tanh(z / softcap).

    weight: [V, H]. bias: [V] or None. softcap: None for none. lora: factors a [r, H], b [V, r] and the scaling of an
    adapter on it, which adds scaling * b @ a to the weight; None for none.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    lora: tuple[Tensor, Tensor, float] | None = None

    @property
    def trainable(self) -> bool:
        """Whether any of its tensors requires a gradient."""
        tensors = (self.weight, self.bias, *(self.lora or ())[:2])
        return any(tensor is not None and tensor.requires_grad for tensor in tensors)

    @property
    def arguments(self) -> dict[str, Any]:
        """What the functions of `dpo_kernels` take beside hidden rows, weight and targets."""
        held: dict[str, Any] = {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}
        return held | ({} if self.lora is None else {"lora": self.lora})


@dataclass(frozen=True, slots=True)
class LogPs:
    """Log-probs of a batch: token_logps [N] of its targets (fp32; float64 for a float64 model), and completion_logps
    [C] float64, their sums."""

    token_logps: Tensor
    completion_logps: Tensor


def prepare(model: PreTrainedModel, layout: Layout) -> None:
    """Select the attention of `layout` ("padded": the model's own), switch the cache off, and refuse what would be
    inexact.

    Raises UserError naming what the model has and the flag to use instead. May be called again with another layout.
    """
    refuse_unsupported(model, layout)
    refuse_head(model)
    use_fast_products(model)
    model.config.use_cache = False
    if layout == "padded":
        model.set_attn_implementation(_stock_name(model))
        return
    _stock_name(model)
    model.set_attn_implementation(ATTENTION)


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """Run the model with its own attention inside the block: for plain forwards and for `generate`."""
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(_stock_name(model))
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _stock_name(model: PreTrainedModel) -> str:
    current = model.config._attn_implementation
    if current != ATTENTION:
        vars(model)["_dpo_stock_attention"] = current
    return str(vars(model).get("_dpo_stock_attention") or ("sdpa" if model._supports_sdpa else "eager"))


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its LM head, final norm included."""
    found: Any = model.get_decoder()  # pyright: ignore[reportCallIssue]
    # some classes find themselves (Llama 4, Mllama), ModernBERT's finds its LM head, which it calls "decoder"
    return model.model if found is model or isinstance(found, nn.Linear) else found  # pyright: ignore[reportReturnType]


def trunk(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    """Hidden rows that go to the LM head, [N, H] (differentiable). The batch is on the model's device.

    Raises PackingError when a layer of the model did not take the packed row's attention, instead of computing wrongly.
    """
    return _hidden_rows(_decode(model, batch), batch)


def trunk_and_routers(model: PreTrainedModel, batch: PackedBatch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The same, and the logits of every layer's router over experts, [B * S, E] each (differentiable)."""
    out = _decode(model, batch, output_router_logits=True)
    return _hidden_rows(out, batch), out.router_logits


def _hidden_rows(out: Any, batch: PackedBatch) -> Tensor:
    return out.last_hidden_state.flatten(0, 1).index_select(0, batch.logit_rows)


def _decode(model: PreTrainedModel, batch: PackedBatch, **more: Any) -> Any:
    refuse_lengths(model, batch)
    if batch.segments is None:
        # no mask: padding is to the right of every token, where a causal model does not look
        return decoder_of(model)(input_ids=batch.input_ids, use_cache=False, **more)
    batch.segments.cache["calls"] = 0
    out = decoder_of(model)(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, segments=batch.segments, **more
    )
    calls, layers = batch.segments.cache["calls"], model.config.get_text_config(decoder=True).num_hidden_layers
    if calls < layers:
        raise PackingError(
            f"{type(model).__name__}: {calls} of {layers} layers used the attention {ATTENTION!r}: use --padded (in a "
            "loop of your own: select it with dpo.model.prepare)"
        )
    return out


def refuse_head(model: PreTrainedModel) -> None:
    """Raise UserError for an LM head that is more than a linear layer (and what `Head` says is done to its logits)."""
    head = model.get_output_embeddings()
    known = {id(p) for module in (decoder_of(model), head) if module is not None for p in module.parameters()}
    known |= {id(p) for p in getattr(model.base_model, "parameters", list)()}
    name = type(model).__name__
    if not isinstance(getattr(head, "weight", None), Tensor):
        raise UserError(f"{name}: expected a linear LM head, found {type(head).__name__}")
    others = [path for path, p in model.named_parameters() if id(p) not in known]
    # a bias that the head and a module around it share has one of two names
    others = [path for path in others if path.rsplit(".", 1)[-1] != "bias" or getattr(head, "bias", None) is None]
    if others:
        raise UserError(f"{name}: expected an LM head that is one linear layer, found {others[0]} beside it")


def head_of(model: PreTrainedModel) -> Head:
    """The LM head's tensors, and what the model's configuration says is done to its logits."""
    linear = model.get_output_embeddings()
    if linear is None or not isinstance(getattr(linear, "weight", None), Tensor):
        raise ValueError(f"model: expected a linear LM head, found {type(linear).__name__} in {type(model).__name__}")
    parts = head_parts(linear)
    return Head(parts.weight, parts.bias, *logit_scaling(model.config.get_text_config(decoder=True)), parts.lora)


def head_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, **head_options: Any) -> Tensor:
    """Log-probs [N] of targets [N] from hidden rows [N, H] through the model's head, differentiable.

    fp32, float64 for float64 hidden rows. head_options: of `dpo_kernels.linear_token_logps` (temperature, plan, ...).
    """
    return inside(model, lambda: _head_logps(model, hidden, targets, **head_options))


def _head_logps(model: PreTrainedModel, hidden: Tensor, targets: Tensor, **head_options: Any) -> Tensor:
    head = head_of(model)
    logps = linear_token_logps(hidden, head.weight, targets, **head.arguments, **head_options)
    assert isinstance(logps, Tensor)  # and no statistics, which nobody asked for
    return logps


def shared_logps(model: PreTrainedModel, batch: PackedBatch, **head_options: Any) -> LogPs:
    """Log-probs of every completion of a packed batch from one forward pass, differentiable.

    model: any causal LM of Transformers; `prepare` is called for the batch's layout if its attention is another. batch:
    from `dpo.pack`, on the model's device. head_options: options of `dpo_kernels.linear_token_logps` (temperature,
    plan, ...).
    """
    if (batch.segments is not None) != (model.config._attn_implementation == ATTENTION):
        prepare(model, batch.layout)
    token_logps = inside(model, lambda: _head_logps(model, trunk(model, batch), batch.targets, **head_options))
    # fp32 sums of hundreds of log-probs lose the digits that a log ratio needs
    sums = token_logps.new_zeros(batch.num_completions, dtype=torch.float64)
    return LogPs(token_logps, sums.index_add(0, batch.completion_ids, token_logps.double()))
