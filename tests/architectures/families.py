"""Every causal language model of the installed Transformers as a tiny random model, and what each layout makes of it.

python -m tests.architectures.families              # write the table into dpo/README.md
python -m tests.architectures.families llama phi3   # print what is found for some
"""

from __future__ import annotations

import copy
import re
import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dpo.errors import UserError
from dpo.load import zero_dropout
from dpo.model import prepare
from dpo.packing import Layout
from tests.packing.helpers import gradient_error, gradients, make_groups, packed_logps, plain_logps, wide_softmax

README = Path(__file__).parents[2] / "dpo" / "README.md"
BEGIN, END = "<!-- families: python -m tests.architectures.families -->", "<!-- end of families -->"
LAYOUTS: tuple[Layout, ...] = ("padded", "packed", "shared")
LOGP_BOUND, GRADIENT_BOUND = 1e-8, 1e-6
MOST_NOISE = 2e-6
"""Plain layouts (single rows, padded rows) of models with fp32 inside (routers, latent norms) differ by up to so much
in a log-prob; packed ones may differ by three times what the plain ones do."""
MOST_WEIGHTS = 3_000_000

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
    "sliding_window": 7,  # shorter than the prompts, and across their border to the completions
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "n_inner": 48,
}
"""Under every name that configurations have for them."""

HEADS: dict[str, float] = {
    "final_logit_softcapping": 3.0,
    "logits_soft_cap": 3.0,
    "logit_scale": 0.3,
    "logits_scaling": 3.0,
    "lm_head_multiplier": 0.5,
}
"""What is done to logits, away from its neutral value, in families whose configuration has it."""

LATENT = {"num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "layer_types": ["mamba", "attention"]}
PER_LAYER = {"vocab_size_per_layer_input": 97, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
CONVOLUTION = {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}
EXTRA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), LATENT),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("bamba", "granitemoehybrid"), MAMBA),
    **dict.fromkeys(("lfm2", "lfm2_moe"), CONVOLUTION),
    "gemma3n_text": PER_LAYER | {"layer_types": ["sliding_attention", "full_attention"], "laurel_rank": 4},
    "gemma4_text": PER_LAYER | {"num_global_key_value_heads": 2, "global_head_dim": 8},
    "gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "granite": {"attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": {"no_rope_layers": [0, 1]},
    # Transformers' eager attention of OLMoE knows no window
    "olmoe": {"sliding_window": None},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs beside SIZES, or instead."""


@dataclass(frozen=True)
class Verdict:
    """What the layouts make of a family: "" where exact, else the refusal. `wrong`: what is neither, by layout.
    `untried`: why there is no tiny model to try."""

    model_type: str
    refusals: dict[str, str]
    wrong: dict[str, str]
    untried: str = ""


def model_types() -> list[str]:
    """A model type for every causal LM class of the registry whose attention goes through the attention interface."""
    found: dict[str, str] = {}
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        cls = class_of(model_type)
        wrapper = cls is None or cls.__name__.endswith("ForConditionalGeneration")
        if cls is not None and not wrapper and cls._supports_attention_backend:
            own = cls.config_class.model_type
            found.setdefault(cls.__name__, own if own in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else model_type)
    return sorted(found.values())


def class_of(model_type: str) -> Any:
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0], None)


def build(model_type: str, **extra: Any) -> PreTrainedModel:
    """A tiny random model in float64, ready to train, its norms and biases away from the 0 and 1 they start at."""
    torch.manual_seed(0)
    cls = class_of(model_type)
    heads = {name: value for name, value in HEADS.items() if name in _fields(cls.config_class)}
    config = cls.config_class(**SIZES | heads | EXTRA.get(model_type, {}) | extra)
    zero_dropout(config)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(copy.deepcopy(config)).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"{size} weights")
    model = cls(config).double().train()
    model.set_attn_implementation("eager")
    model.config._experts_implementation = "eager"  # grouped products know no float64
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean().round()), std=0.2)
    return model


def _fields(config: type) -> set[str]:
    """Settings of a configuration, without those that it computes."""
    return {name for name in vars(config()) if not isinstance(getattr(config, name, None), property)}


def judge(model_type: str) -> Verdict:
    """Compare every layout with plain forwards of the same model, in log-probs and gradients, in float64."""
    groups = make_groups((2, 3, 2), longest=24)
    try:
        model = build(model_type)
        expected = plain_logps(model, groups)
        expected_gradients = gradients(model, expected)
    except Exception as error:
        return Verdict(model_type, {}, {}, f"{type(error).__name__}: {' '.join(str(error).split())}")
    refusals, wrong, noise = {}, {}, 0.0
    for layout in LAYOUTS:
        try:
            prepare(model, layout)
            with wide_softmax():
                logps, _ = packed_logps(model, groups, layout)
                found = gradients(model, logps)
            difference = float((logps - expected).detach().abs().max())
            slope = gradient_error(found, expected_gradients)
            noise = difference if layout == "padded" else noise
            if not (slope < GRADIENT_BOUND and difference < max(LOGP_BOUND, min(3 * noise, MOST_NOISE))):
                wrong[layout] = f"log-probs differ by {difference:.1e}, gradients by {slope:.1e}"
            refusals[layout] = ""
        except UserError as refusal:
            refusals[layout] = str(refusal)
        except Exception as error:
            wrong[layout] = f"{type(error).__name__}: {error}"
    return Verdict(model_type, refusals, wrong)


def table(verdicts: Iterable[Verdict]) -> list[str]:
    """The lines between the markers of the README."""
    lines = [
        f"Transformers {transformers.__version__}. `yes`: exact; a refusal comes with its reason.",
        "",
        "| model type | shared | `--no-share-prefix` | `--padded` | |",
        "|---|---|---|---|---|",
    ]
    untried = []
    for verdict in verdicts:
        if verdict.untried:
            untried.append(f"`{verdict.model_type}`")
            continue
        cells = ["no" if verdict.refusals[layout] else "yes" for layout in ("shared", "packed", "padded")]
        reason = next((_short(verdict.refusals[k]) for k in LAYOUTS if verdict.refusals[k]), "")
        lines.append(f"| {' | '.join((verdict.model_type, *cells, reason))} |")
    return [*lines, "", f"Not tried, for want of a tiny configuration: {', '.join(untried)}."]


def _short(refusal: str) -> str:
    """The refusal without the model's name, the place in it, and the flag."""
    if "`segments` did not reach" in refusal:
        return "attention that takes no arguments"
    if "no attention mask" in refusal:
        return "attention with a mask of its own"
    if "LM head that is one linear layer" in refusal:
        return "an LM head of more than one layer"
    for start in (" has ", "found ", "expected "):
        if start in refusal:
            refusal = refusal.split(start, 1)[1]
            break
    return re.split(r" in [a-z]| \(|, which|: | beside", refusal)[0]


def readme_table() -> list[str]:
    text = README.read_text(encoding="utf-8")
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def write_readme(lines: Sequence[str]) -> None:
    text = README.read_text(encoding="utf-8")
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    README.write_text("\n".join((before, *lines, after)), encoding="utf-8")


def main(names: Sequence[str]) -> None:
    warnings.simplefilter("ignore")
    verdicts = []
    for name in names or model_types():
        verdicts.append(judge(name))
        print(verdicts[-1], flush=True)
    if not names:
        write_readme(table(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
