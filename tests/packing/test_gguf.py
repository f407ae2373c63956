"""A GGUF checkpoint becomes an ordinary model: plain fp32 weights that train, save and load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from dpo.load import load_model
from tests.train.toy import toy_config

gguf: Any = pytest.importorskip("gguf", reason="the gguf extra is not installed")
pytest.importorskip("accelerate", reason="the gguf extra is not installed")

LAYER = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
OTHER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _name(key: str) -> str:
    stem = key.removesuffix(".weight")
    if stem in OTHER:
        return f"{OTHER[stem]}.weight"
    _, _, number, part = stem.split(".", 3)
    return f"blk.{number}.{LAYER[part]}.weight"


def _interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of query and key as llama.cpp keeps them: the two halves of a head's rotary dimensions taken in turns."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path: Path, model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Writes the model with 8-bit weights. Returns what they are after rounding, by Transformers' names."""
    config, rounded = model.config, {}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for key, tensor in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((n for name, n in heads.items() if name in key), None)
        held = tensor if turned is None else _interleaved(tensor, turned)
        values = held.numpy().astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0 if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        packed = gguf.quants.quantize(values, kind)
        writer.add_tensor(_name(key), packed, raw_dtype=kind)
        back = torch.from_numpy(gguf.quants.dequantize(packed, kind).astype(np.float32))
        if turned is not None:
            rows, columns = back.shape
            back = back.view(turned, rows // turned // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        rounded[key] = back
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rounded


def test_a_gguf_file_is_loaded_as_plain_weights_that_train_and_save(tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(toy_config(64, intermediate_size=64))
    expected = write_gguf(tmp_path / "tiny.gguf", model)
    assert not torch.equal(expected["lm_head.weight"], model.lm_head.weight)  # it was rounded
    loaded: Any = load_model(str(tmp_path / "tiny.gguf"))
    found = loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected[name]), name
    assert getattr(loaded, "hf_quantizer", None) is None
    assert not hasattr(loaded.config, "quantization_config")
    loaded(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
