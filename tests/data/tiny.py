"""Small real tokenizers, one of each kind that treats prompts and completions differently, and rows to feed them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Ends a turn with a newline after the end-of-sequence, and inserts a default system turn (as SmolLM2 and Qwen do)."""

INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
"""Writes its own BOS, has no generation prompt, and puts spaces around the answer (as Llama 2 does)."""

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It was a good day, and a bad night.",
    "Question: what is unhappy? Answer: it is not happy, unlucky and unkind.\n\nHuman: hello\n\nAssistant: hi there",
    "user assistant system 0123456789 café naïve 猫 😀 'quoted' (brackets) [INST] yes [/INST] no!",
]
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _fast(tokenizer: Tokenizer, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template, **special)


def _byte_level(*, add_prefix_space: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer


def _with_specials(tokenizer: Tokenizer, single: str) -> Tokenizer:
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    return tokenizer


@cache
def chatml() -> Any:
    """Byte-level, no BOS, pad == eos == <|im_end|>, ChatML (SmolLM2, Qwen)."""
    return _fast(_byte_level(), CHATML, eos_token="<|im_end|>", pad_token="<|im_end|>")


@cache
def bos_first() -> Any:
    """Byte-level with a BOS in front (Llama 3)."""
    return _fast(_with_specials(_byte_level(), "<s> $A"), bos_token="<s>", eos_token="</s>")


@cache
def bos_and_eos() -> Any:
    """Byte-level that puts BOS in front and an end-of-sequence behind every text."""
    return _fast(_with_specials(_byte_level(), "<s> $A </s>"), bos_token="<s>", eos_token="</s>")


@cache
def prefix_space() -> Any:
    """Byte-level that puts a space before every text and trims offsets (RoBERTa, OPT)."""
    tokenizer = _byte_level(add_prefix_space=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return _fast(tokenizer, eos_token="</s>")


@cache
def metaspace() -> Any:
    """Unigram with Metaspace, a word marker before every text (SentencePiece), BOS in front."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=list("\n\u2581"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return _fast(_with_specials(tokenizer, "<s> $A"), INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def llama2() -> Any:
    """BPE whose normalizer writes the word marker, without a pre-tokenizer, with byte fallback (Llama 2)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator([word for text in CORPUS for word in text.split()] * 3, trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary.update({byte: len(vocabulary) + i for i, byte in enumerate(bytes_)})
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return _fast(_with_specials(tokenizer, "<s> $A"), INST, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


ALL = (chatml, bos_first, bos_and_eos, prefix_space, metaspace, llama2)


def eos_of(tokenizer: Any) -> list[int]:
    return [tokenizer.eos_token_id]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}
