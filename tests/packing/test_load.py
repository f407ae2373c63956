"""Loading, refusals by name, and the head's description."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dpo.checks import check_sharing
from dpo.errors import UserError
from dpo.model import eos_token_ids, head_of, load_model, load_tokenizer, prepare, shared_logps
from dpo.packing import Group, pack
from tests.packing.helpers import _SIZES, make_groups, make_model

SMALL: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def test_load_and_save_again(tmp_path):
    model = make_model("llama", torch.bfloat16)
    loaded = load_model(save(model, tmp_path / "a"))
    assert loaded.dtype == torch.float32
    assert loaded.config.use_cache is False
    prepare(loaded, "shared")
    shared_logps(loaded, pack(make_groups((2,)))).completion_logps.sum().backward()
    again = load_model(save(loaded, tmp_path / "b"), dtype=torch.float64)
    # the attention of training is not written into the model
    assert again.config._attn_implementation == "sdpa"
    weights = loaded.state_dict()
    assert all(torch.equal(value.float(), weights[name]) for name, value in again.state_dict().items())


def test_dropout_is_zeroed_with_a_notice(tmp_path, caplog):
    config = OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.2)
    path = save(OPTForCausalLM(config), tmp_path)
    loaded = load_model(path).train()
    assert "dropout set to 0: " in caplog.text
    assert "attention_dropout 0.2" in caplog.text
    assert all(module.p == 0 for module in loaded.modules() if isinstance(module, torch.nn.Dropout))
    assert check_sharing(loaded, make_groups((2, 3))).max_abs_error < 1e-5
    kept = load_model(path, keep_dropout=True).train()
    assert kept.config.attention_dropout == 0.2
    with pytest.raises(UserError, match=r"attention dropout 0\.2 cannot be packed"):
        check_sharing(kept, make_groups((2, 3)))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./no/such/folder", "--model ./no/such/folder: expected a folder with a model, found no such folder"),
        ("{tmp}", "expected config.json or one .gguf file"),
        ("{tmp}/notes.txt", "found another file"),
    ],
)
def test_nothing_there(path, message, tmp_path):
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(UserError, match=message):
        load_model(path.format(tmp=tmp_path))


def test_not_a_causal_model(tmp_path):
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=32, d_ff=48, num_layers=1, num_heads=2, d_kv=16))
    with pytest.raises(UserError, match="expected a causal language model, found model type 't5'"):
        load_model(save(t5, tmp_path / "t5"))
    bert = BertLMHeadModel(BertConfig(**SMALL, intermediate_size=48))
    with pytest.raises(UserError, match="expected a causal language model"):
        prepare(bert, "shared")


def test_missing_weights_and_tokenizer(tmp_path):
    model = make_model("llama", torch.float32)
    path = save(model.model, tmp_path)
    with pytest.raises(UserError, match=r"expected every weight, found 1 missing, the first 'lm_head\.weight'"):
        load_model(path)
    with pytest.raises(UserError, match="--model"):
        load_tokenizer(path)


def test_end_of_sequence_lists():
    model = make_model("llama")
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [7, 5]
    model.config.eos_token_id = 2
    assert eos_token_ids(model, None) == [7, 5, 2]


REFUSED = {
    "attention sinks": lambda: GptOssForCausalLM(
        GptOssConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, num_local_experts=4)
    ),
    "linear attention layers": lambda: Qwen3NextForCausalLM(
        Qwen3NextConfig(
            **SMALL,
            intermediate_size=48,
            num_key_value_heads=2,
            layer_types=["linear_attention", "full_attention"],
            num_experts=0,
            linear_num_key_heads=2,
            linear_num_value_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        )
    ),
    "ALiBi": lambda: BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
    "state-space": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, state_size=4, num_hidden_layers=2)
    ),
}


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("reason", REFUSED)
def test_refused_by_name_but_padded_is_exact(reason, layout):
    torch.manual_seed(0)
    model = REFUSED[reason]()
    with pytest.raises(UserError, match=f"{reason}.*use --padded"):
        prepare(model, layout)
    assert check_sharing(model, make_groups((2, 3)), "padded").max_abs_error < 1e-5


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_scaling_that_depends_on_the_length(kind):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 16}
    config = LlamaConfig(**_SIZES, rope_parameters=rope, max_position_embeddings=64 if kind == "longrope" else 16)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    short, long = Group([1, 2, 3], [[4], [5, 6]], [(0, 1)]), Group([1] * 20, [[4], [5, 6]], [(0, 1)])
    assert check_sharing(model, [short]).max_abs_error < 1e-5
    with pytest.raises(UserError, match=f"rotary scaling '{kind}', which changes at 16 tokens.* of 4 and 22"):
        shared_logps(model, pack([short, long]))
    if kind == "longrope":
        assert check_sharing(model, [short, long]).num_tokens == 3  # of one side of the limit
        assert check_sharing(model, [long]).max_abs_error < 1e-5
    else:
        # the factors depend on the length itself, and on the longest batch before
        with pytest.raises(UserError, match="sequences of 21 and 22"):
            check_sharing(model, [long])


@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda: GraniteForCausalLM(GraniteConfig(**_SIZES, logits_scaling=4.0)), 0.25),
        (lambda: Cohere2ForCausalLM(Cohere2Config(**_SIZES, logit_scale=0.5, sliding_window=5)), 0.5),
    ],
)
def test_logit_scales(make, scale):
    torch.manual_seed(0)
    model = make()
    assert head_of(model).logit_scale == scale
    assert check_sharing(model, make_groups((2, 4))).max_abs_error < 1e-5


def test_frozen_head_is_told():
    model = make_model("llama")
    assert head_of(model).trainable
    model.requires_grad_(False)
    assert not head_of(model).trainable
