"""Tiny random models, random groups, and plain forwards of the same model to compare with."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dpo.model import shared_logps
from dpo.packing import Group, Layout, PackedBatch, pack

VOCABULARY = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
WINDOW = 7
"""Sliding window of the Mistral and Gemma-2 below: shorter than the test's prompts, than its completions, and across
their border."""

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_SIZES, sliding_window=WINDOW)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **_SIZES,
            head_dim=8,
            sliding_window=WINDOW,
            query_pre_attn_scalar=8,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
        )
    ),
}
ORACLE = {"llama": "sdpa", "qwen2": "sdpa", "mistral": "sdpa", "gemma2": "eager"}


def make_model(name: str, dtype: torch.dtype = torch.float64, *, exact: bool = False, seed: int = 0) -> PreTrainedModel:
    """A tiny model in `dtype`, ready to train; `exact`: its norms and rotary tables compute in float64 throughout."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    model.set_attn_implementation(ORACLE[name])
    model = model.to(dtype).train()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            # norms and biases start at 0 or 1, which hides mistakes in them
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.2)
    if exact:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = types.MethodType(_exact_norm, module)  # pyright: ignore[reportAttributeAccessIssue]
            elif type(module).__name__.endswith("RotaryEmbedding"):
                module.forward = types.MethodType(_exact_rotary, module)  # pyright: ignore[reportAttributeAccessIssue]
    return model


def _exact_norm(module: Any, hidden: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    weight = module.weight + 1 if "Gemma" in type(module).__name__ else module.weight
    return weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + eps)


def _exact_rotary(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    angles = position_ids[..., None].double() * module.inv_freq.double()
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


@contextmanager
def wide_softmax() -> Iterator[None]:
    """Transformers' eager attention asks for an fp32 softmax; inside this block a float64 input gets a float64 one."""
    plain = torch.nn.functional.softmax

    def wide(scores: Tensor, dim: int = -1, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
        return plain(scores, dim=dim, dtype=torch.promote_types(scores.dtype, dtype or scores.dtype), **kwargs)

    torch.nn.functional.softmax = wide
    try:
        yield
    finally:
        torch.nn.functional.softmax = plain


def make_groups(completions: Sequence[int] = (2, 4, 3), *, seed: int = 0, longest: int = 20) -> list[Group]:
    """Random groups with that many completions each; prompts of 1 to `longest` tokens, completions of 1 to longest //
    2."""
    rng = np.random.default_rng(seed)

    def tokens(high: int) -> list[int]:
        return rng.integers(0, VOCABULARY, rng.integers(1, high + 1)).tolist()

    groups = []
    for row, count in enumerate(completions):
        ys = [tokens(longest // 2) for _ in range(count)]
        groups.append(Group(tokens(longest), ys, [(i, (i + 1) % count) for i in range(count - 1)], row=row))
    return groups


def plain_logps(model: PreTrainedModel, groups: Sequence[Group]) -> Tensor:
    """Log-probs [N] of every completion token: one call of the stock model a completion, its own logits, no code of
    ours."""
    out = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt, *completion]])
            with wide_softmax():
                logits = model(input_ids=ids, use_cache=False).logits[0]
            logps = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
            out.append(logps[len(group.prompt) - 1 :])
    return torch.cat(out)


def gradients(model: PreTrainedModel, logps: Tensor, seed: int = 1) -> dict[str, Tensor]:
    """Gradient of a random weighting of the log-probs, by parameter."""
    model.zero_grad()
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (logps * weights.to(logps.dtype)).sum().backward()
    return current_gradients(model)


def current_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def gradient_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest norm-wise relative difference over the parameters, with a floor for gradients that are zero."""
    assert found.keys() == expected.keys()
    total = float(torch.stack([g.norm() for g in expected.values()]).norm())
    floor = 1e-3 * total / len(expected)
    return max(float((found[k] - expected[k]).norm() / expected[k].norm().clamp(min=floor)) for k in expected)


def packed_logps(model: PreTrainedModel, groups: Sequence[Group], layout: Layout) -> tuple[Tensor, PackedBatch]:
    batch = pack(groups, layout=layout)
    return shared_logps(model, batch).token_logps, batch
