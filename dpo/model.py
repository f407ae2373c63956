"""The causal LM as a trunk and a head: load it, make it ready for packed rows, run it on a batch.

Shapes: B, S rows and tokens of a batch, N completion tokens, H hidden, V vocabulary, C completions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.attention import ATTENTION
from dpo.packing import Layout, PackedBatch

try:
    from dpo_kernels import linear_token_logps
except ImportError:

    def linear_token_logps(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None, **_):
        logits = (
            nn.functional.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
            * logit_scale
        )
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Head:
    """The LM head: logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap). weight [V, H], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    softcap: float | None
    trainable: bool


@dataclass(frozen=True, slots=True)
class LogPs:
    """token_logps: [N] log-probs of the batch's targets (fp32; float64 for a float64 model). completion_logps: [C] float64, their sums."""

    token_logps: Tensor
    completion_logps: Tensor


def decoder_of(model: nn.Module) -> nn.Module:
    """The model without its LM head, final norm included."""
    return model.get_decoder()


def prepare(model: PreTrainedModel, layout: Layout) -> None:
    model.config.use_cache = False
    model.set_attn_implementation(ATTENTION if layout != "padded" else "sdpa" if model._supports_sdpa else "eager")


def trunk(model: nn.Module, batch: PackedBatch) -> Tensor:
    """Hidden rows that go to the LM head, [N, H] (differentiable)."""
    kwargs: dict[str, Any] = {}
    if batch.segments is not None:
        kwargs = {"position_ids": batch.position_ids, "segments": batch.segments}
    # padded rows need no mask: padding is to the right of every token, where a causal model does not look
    out = decoder_of(model)(input_ids=batch.input_ids, use_cache=False, **kwargs)
    return out.last_hidden_state.flatten(0, 1).index_select(0, batch.logit_rows)


def head_of(model: PreTrainedModel) -> Head:
    """The LM head's tensors and its post-processing of logits, as the model's configuration states it."""
    linear = model.get_output_embeddings()
    config = model.config.get_text_config()
    scale = 1.0
    if getattr(config, "logits_scaling", None):
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):
        scale = config.logit_scale
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(linear.weight, getattr(linear, "bias", None), float(scale), softcap, linear.weight.requires_grad)


def shared_logps(model: PreTrainedModel, batch: PackedBatch, **head_options: Any) -> LogPs:
    """Log-probs of every completion of a packed batch from one forward pass, differentiable.

    model: made ready by `prepare`. batch: from `dpo.pack`, on the model's device. head_options: of `dpo_kernels.linear_token_logps`.
    """
    head = head_of(model)
    hidden = trunk(model, batch)
    token_logps = linear_token_logps(
        hidden,
        head.weight,
        batch.targets,
        bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        **head_options,
    )
    # fp32 sums of hundreds of log-probs lose the digits that a log ratio needs
    sums = token_logps.new_zeros(batch.num_completions, dtype=torch.float64)
    return LogPs(token_logps, sums.index_add(0, batch.completion_ids, token_logps.double()))
