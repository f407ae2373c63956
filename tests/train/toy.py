"""A tiny Llama with a byte tokenizer and a preference file it can learn, written to a folder as users have them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from dpo.packing import Group


def write_model(folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """A random two-layer GQA Llama over bytes, with tokenizer; end-of-sequence is <eos>."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    vocabulary = {token: k for k, token in enumerate(["<bos>", "<eos>", *sorted(alphabet)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config(len(vocabulary), **overrides))
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


LOGP_BOUND, GRAD_BOUND = 1e-8, 1e-6
"""Measured for stock modules of Transformers in float64, which drop to fp32 inside (RMSNorm, rotary tables)."""


def float64_model(seed: int) -> LlamaForCausalLM:
    """The toy model, random, in float64."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(toy_config()).double()


def toy_config(vocabulary: int = 258, **overrides: Any) -> LlamaConfig:
    settings = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**settings | overrides)


def toy_mixture(seed: int = 0, **overrides: Any) -> MixtralForCausalLM:
    """The same with four experts a layer, of which a token takes two."""
    llama = toy_config(**overrides)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "bos_token_id", "eos_token_id", "initializer_range", "tie_word_embeddings")
    torch.manual_seed(seed)
    sizes = {name: getattr(llama, name) for name in names}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2))


def write_pairs(path: Path, count: int = 24, seed: int = 0) -> Path:
    """Prompts with a cheerful chosen and a gloomy rejected completion."""
    draw = random.Random(seed)
    with path.open("w") as file:
        for k in range(count):
            word = "".join(draw.choices("abcdefgh", k=draw.randint(1, 9)))
            row = {"prompt": f"{k} {word}:", "chosen": f" good {word}", "rejected": f" bad{draw.choice('!?.')}"}
            file.write(json.dumps(row) + "\n")
    return path


def write_toy(folder: Path, pairs: int = 24, held_out: int = 0, **overrides: Any) -> Path:
    """A folder with model/, pairs.jsonl and, where asked for, held_out.jsonl of other pairs."""
    write_model(folder / "model", **overrides)
    write_pairs(folder / "pairs.jsonl", count=pairs)
    if held_out:
        write_pairs(folder / "held_out.jsonl", count=held_out, seed=1)
    return folder


class Groups(list[Group]):
    """Groups in memory with what a step asks of the data."""

    def num_pairs(self, index: int) -> int:
        return len(self[index].pairs)


def random_groups(
    count: int = 9, vocabulary: int = 258, seed: int = 0, completions: tuple[int, int] = (2, 4)
) -> Groups:
    """Groups of 2 to 4 completions with several pairs each, of uneven lengths."""
    draw = random.Random(seed)
    groups = Groups()
    for k in range(count):
        number = draw.randint(*completions)
        pairs = [(a, b) for a in range(number) for b in range(number) if a < b]
        ids = [[draw.randrange(vocabulary) for _ in range(draw.randint(1, 12))] for _ in range(number)]
        groups.append(Group([draw.randrange(vocabulary) for _ in range(draw.randint(1, 20))], ids, pairs, row=k))
    return groups
