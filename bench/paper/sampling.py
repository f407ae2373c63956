"""Samples of a policy, their rewards, and their divergence from the reference.

B samples, P prompt tokens, L tokens in all, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dpo.model import stock_attention

BATCH = 256
LOGITS = 2**26
"""At most so many logits at a time: 256 MiB of fp32."""
Reward = Callable[[str], float]


@torch.no_grad()
def sample(model: Any, prompts: Tensor, max_new_tokens: int, seed: int) -> Tensor:
    """Samples one completion of each prompt [B, P] at temperature 1: [B, P + max_new_tokens], filled with the end of
    sequence behind the first one."""
    end, generator = model.config.eos_token_id, torch.Generator().manual_seed(seed)
    model.eval()
    with stock_attention(model):
        parts = [_sample(model, part, max_new_tokens, end, generator) for part in prompts.split(BATCH)]
    return torch.cat(parts)


def _sample(model: Any, prompts: Tensor, max_new_tokens: int, end: int, generator: torch.Generator) -> Tensor:
    cache, step = DynamicCache(config=model.config), prompts
    written = [prompts]
    finished = torch.zeros(len(prompts), 1, dtype=torch.bool)
    for _ in range(max_new_tokens):
        out = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        step = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=generator).masked_fill(finished, end)
        finished = finished | (step == end)
        written.append(step)
    return torch.cat(written, 1)


def completion_mask(rows: Tensor, prompt: int, end: int) -> Tensor:
    """[B, L - prompt]: True up to and including the first end of sequence behind the prompt."""
    ended = (rows[:, prompt:] == end).cumsum(1)
    return (ended == 0) | ((ended == 1) & (rows[:, prompt:] == end))


def completions_of(rows: Tensor, prompt: int, end: int) -> list[list[int]]:
    """The completions' token ids without what stands behind their end."""
    mask = completion_mask(rows, prompt, end)
    return [row[kept].tolist() for row, kept in zip(rows[:, prompt:], mask, strict=True)]


def rewards_of(rows: Tensor, tokenizer: Any, reward: Reward) -> Tensor:
    """[B] float64: the reward of prompt and completion together."""
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return torch.tensor([reward(text) for text in texts], dtype=torch.float64)


@torch.no_grad()
def divergences(policy: Any, reference: Any, rows: Tensor, prompt: int) -> tuple[Tensor, Tensor]:
    """Two unbiased estimates [B] of the sequence KL(policy || reference) from the policy's samples, float64.

    The first sums the exact KL of every next-token distribution along the sample, and has the smaller variance; the
    second is the plain log ratio of the sample.
    """
    end, found = policy.config.eos_token_id, ([], [])
    batch = max(1, min(BATCH, LOGITS // (rows.shape[1] * policy.config.vocab_size)))
    policy.eval()
    with stock_attention(policy), stock_attention(reference):
        for part in rows.split(batch):
            mine, theirs = (
                model(input_ids=part, use_cache=False).logits[:, prompt - 1 : -1].log_softmax(-1)
                for model in (policy, reference)
            )
            mask = completion_mask(part, prompt, end)
            ratio = mine - theirs
            exact = (mine.exp() * ratio).sum(-1)
            plain = ratio.gather(-1, part[:, prompt:, None])[..., 0]
            for held, values in zip(found, (exact, plain), strict=True):
                held.append((values.double() * mask).sum(1))
    return torch.cat(found[0]), torch.cat(found[1])


@dataclass(frozen=True)
class Measured:
    """Means over samples, each with its standard error (prompts are the independent units)."""

    kl: float
    kl_se: float
    kl_plain: float
    """The plain log ratio's mean, as a check."""
    kl_plain_se: float
    reward: float
    reward_se: float
    tokens: float
    """Mean length of a completion."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def mean_and_error(values: Tensor, per_prompt: int) -> tuple[float, float]:
    """Mean of values [prompts * per_prompt], a prompt's adjacent, and its standard error over prompts."""
    means = values.view(-1, per_prompt).mean(1)
    return means.mean().item(), means.std().item() / math.sqrt(len(means))


def measure(
    policy: Any, reference: Any, tokenizer: Any, reward: Reward, prompts: Tensor, per_prompt: int, new: int, seed: int
) -> Measured:
    """Samples `per_prompt` completions of up to `new` tokens a prompt [B, P] and measures them."""
    length = prompts.shape[1]
    rows = sample(policy, prompts.repeat_interleave(per_prompt, 0), new, seed)
    exact, plain = divergences(policy, reference, rows, length)
    kept = completion_mask(rows, length, policy.config.eos_token_id).sum(1).double()
    kl, plain_kl, rewards = (mean_and_error(v, per_prompt) for v in (exact, plain, rewards_of(rows, tokenizer, reward)))
    return Measured(*kl, *plain_kl, *rewards, tokens=kept.mean().item())


def best_of(rewards: Tensor, n: int) -> tuple[float, float, float]:
    """Expected best reward of `n` samples out of rewards [prompts, M], its standard error, and KL log n - (n - 1) / n.

    The mean over all subsets of n (order statistics), which has less variance than drawing one.
    """
    ordered, m = rewards.sort(1).values, rewards.shape[1]
    weights = torch.tensor([math.comb(k, n - 1) / math.comb(m, n) for k in range(m)], dtype=torch.float64)
    means = ordered @ weights
    error = means.std().item() / math.sqrt(len(means))
    return means.mean().item(), error, math.log(n) - (n - 1) / n
