"""The reference: a small Llama fine-tuned on review snippets, and the prompts that it is asked to complete."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.paper.settings import Settings
from dpo.checkpoint import save_model
from dpo.console import Bar
from dpo.model import prepare, shared_logps
from dpo.packing import Group, pack

END = "<|end|>"


def load_texts(path: Path, settings: Settings, seed: int) -> list[str]:
    """Snippets in a seeded order: the first `settings.snippets` are for fine-tuning, the rest is held out."""
    texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(seed).shuffle(texts)
    return texts


def fine_tune(folder: Path, texts: Sequence[str], settings: Settings, seed: int) -> tuple[Any, Any]:
    """Model and tokenizer in `folder`, trained on the texts unless they are there; goes on from the last epoch."""
    if not (folder / "config.json").exists():
        tokenizer = _tokenizer(texts, settings)
        model = _model(tokenizer, settings, seed)
        _train(model, tokenizer, texts, settings, seed, folder.with_name("language.pt"))
        save_model(folder, model, tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def _tokenizer(texts: Sequence[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE learned from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=settings.vocabulary, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def _model(tokenizer: PreTrainedTokenizerFast, settings: Settings, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    end = tokenizer.convert_tokens_to_ids(END)
    assert isinstance(end, int)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def _train(model: Any, tokenizer: Any, texts: Sequence[str], settings: Settings, seed: int, progress: Path) -> None:
    """Ordinary language modelling through the packed forward; `progress` holds the state after each epoch."""
    prepare(model, "shared")
    end = tokenizer.eos_token_id
    groups = [Group([end], [[*ids, end]], []) for ids in tokenizer(list(texts)).input_ids]
    starts = range(0, len(groups), settings.language_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.language_lr)
    first = 0
    if progress.exists():
        state = torch.load(progress, weights_only=True)
        first = state["epoch"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    total = settings.epochs * len(starts)
    with Bar("fine-tune", total, done=first * len(starts), log_every=50) as bar:
        for epoch in range(first, settings.epochs):
            order = random.Random(f"{seed} {epoch}").sample(range(len(groups)), len(groups))
            for k, start in enumerate(starts):
                done = (epoch * len(starts) + k + 1) / total
                optimizer.param_groups[0]["lr"] = settings.language_lr * min(1, done / 0.05) * _cosine(done)
                batch = pack([groups[i] for i in order[start : start + settings.language_batch]])
                loss = -shared_logps(model, batch).token_logps.mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                bar.advance(pairs=0, tokens=batch.num_tokens, info=f"loss {loss.item():.2f}")
            save_whole(progress, {"epoch": epoch + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()})


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


def save_whole(path: Path, value: Any) -> None:
    """torch.save under its name only once it is complete."""
    aside = path.with_name(path.name + ".tmp")
    torch.save(value, aside)
    aside.replace(path)


def beginnings(texts: Sequence[str], tokenizer: Any, count: int, settings: Settings) -> Tensor:
    """The first tokens of `count` texts behind the prefix, [count, P].

    Beginnings that another tokenisation of their text would change are left out: trainers that take text get the same.
    """
    rows, prefix = [], tokenizer(settings.prefix).input_ids
    for text in texts:
        ids = tokenizer(text).input_ids[: settings.prompt_tokens]
        if len(ids) == settings.prompt_tokens and tokenizer(tokenizer.decode(ids)).input_ids == ids:
            rows.append([*prefix, *ids])
        if len(rows) == count:
            break
    assert len(rows) == count, f"expected {count} beginnings, found {len(rows)}"
    return torch.tensor(rows)
