"""The demo's language model: a byte-level BPE, a Llama of a quarter of a million weights, and its warm-up.

Shapes: N completion tokens of a batch, V vocabulary, H hidden.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dpo.console import Bar
from dpo.model import prepare, shared_logps
from dpo.packing import Group, pack

VOCABULARY = 2048
END, UNKNOWN = "<|end|>", "<|unknown|>"


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY tokens learned from `texts`.

    Only bytes that occur in `texts` get a token, which leaves more of the vocabulary to words; others become UNKNOWN.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END, UNKNOWN], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, unk_token=UNKNOWN)


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama: H = 64, 2 layers, 4 heads, embeddings tied."""
    torch.manual_seed(seed)
    end = tokenizer.convert_tokens_to_ids(END)
    assert isinstance(end, int)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=end,
    )
    return LlamaForCausalLM(config)


def warm_up(
    model: LlamaForCausalLM,
    groups: Sequence[Group],
    *,
    epochs: int = 8,
    groups_per_step: int = 16,
    lr: float = 3e-3,
    seed: int = 0,
) -> float:
    """Ordinary language modelling on every completion, chosen and rejected alike, through the same packed forward.

    Returns the mean loss of the last epoch, in nats per token.
    """
    prepare(model, "shared")
    starts = range(0, len(groups), groups_per_step)
    steps = epochs * len(starts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    shuffle = random.Random(seed)
    order = list(range(len(groups)))
    losses: list[float] = []
    with Bar("warm-up", steps, log_every=len(starts)) as bar:
        for _ in range(epochs):
            shuffle.shuffle(order)
            for start in starts:
                batch = pack([groups[i] for i in order[start : start + groups_per_step]])
                loss = -shared_logps(model, batch).token_logps.mean()
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                bar.advance(pairs=batch.num_pairs, tokens=batch.num_tokens, info=f"loss {losses[-1]:.2f}")
    return sum(losses[-len(starts) :]) / len(starts)
