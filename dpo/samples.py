"""What policy and reference write, side by side, and the sequence KL between them, estimated from the policy's samples.

P prompts, S samples of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import GenerationConfig

from dpo.chat import BadRow, Chat
from dpo.config import TrainConfig
from dpo.data import PreferenceData
from dpo.distributed import on_main
from dpo.errors import UserError
from dpo.load import eos_token_ids
from dpo.loss import Objective
from dpo.model import shared_logps, stock_attention
from dpo.modes import in_evaluation
from dpo.packing import Group, Layout, pack, plan_groups, split_group
from dpo.parallel import gathered_once, is_sharded
from dpo.readers import read_rows
from dpo.tokenize import Codec

Ids = list[int]


@dataclass(frozen=True)
class SamplePlan:
    """Which prompts, and how they are continued. The same seed before every generation, policy's or reference's, so
    that equal models write equal texts."""

    prompts: tuple[Ids, ...]
    texts: tuple[str, ...]
    """The prompts as they read."""
    per_prompt: int
    max_tokens: int
    temperature: float
    """0: the most likely token."""
    seed: int
    token_budget: int
    layout: Layout
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class KL:
    """Sequence KL(policy || reference) in nats: mean log ratio of the policy's samples, its standard error over prompts
    (None where there is but one sample), both at the sampling temperature and up to the token limit."""

    mean: float
    standard_error: float | None


def plan_samples(config: TrainConfig, tokenizer: Any, model: Any, held_out: PreferenceData) -> SamplePlan:
    """Reads --sample-prompts: a number takes the first different prompts of the held-out data, else a file of prompts.

    Raises UserError for a file without usable prompts.
    """
    eos = eos_token_ids(model, tokenizer)
    asked = str(config.sample_prompts)
    if asked.isdigit():
        prompts = _first_prompts(held_out, int(asked))
    else:
        prompts = _read_prompts(asked, tokenizer, eos, config.max_prompt_length)
    return SamplePlan(
        prompts=tuple(prompts),
        texts=tuple(tokenizer.batch_decode(prompts, skip_special_tokens=True)),
        per_prompt=config.samples_per_prompt,
        max_tokens=config.sample_tokens,
        temperature=config.sample_temperature,
        seed=config.seed,
        token_budget=config.token_budget,
        layout=config.layout,
        eos_token_ids=tuple(eos),
    )


def _first_prompts(data: PreferenceData, count: int) -> list[Ids]:
    found: dict[tuple[int, ...], None] = {}
    for index in range(len(data)):
        if len(found) == count:
            break
        found[tuple(data[index].prompt)] = None
    return [list(prompt) for prompt in found]


def _read_prompts(path: str, tokenizer: Any, eos: Sequence[int], limit: int | None) -> list[Ids]:
    """A line a prompt from a .txt file, else the field `prompt` (a text, or messages) of any file that --data takes."""
    flag, codec = f"--sample-prompts {path}", Codec(tokenizer, eos)
    if path.endswith(".txt"):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"{flag}: expected a readable text file, found {error}") from error
        prompts = codec.prompts([line for line in lines if line.strip()], templated=False)
    else:
        chat, prompts = Chat(tokenizer), []
        for number, row in read_rows(path, name="--sample-prompts").numbered():
            prompt = row.get("prompt")
            messages = isinstance(prompt, list)
            try:
                text = chat.render(chat.messages(prompt, "prompt"), [])[0] if messages else prompt
            except BadRow as error:
                raise UserError(f"{flag}: row {number}: {error.reason}: {error.detail}") from error
            if not isinstance(text, str) or not text.strip():
                raise UserError(f"{flag}: row {number}: field 'prompt': expected a text or messages, found {prompt!r}")
            prompts += codec.prompts([text], templated=messages)
    if not prompts:
        raise UserError(f"{flag}: expected prompts, found none")
    return [codec.cut_prompt(ids, limit) for ids in prompts]


@torch.no_grad()
def generate(model: Any, plan: SamplePlan, objective: Objective) -> list[list[Ids]]:
    """Continues every prompt `per_prompt` times from the model's own distribution, [P][S] lists of token ids.

    Batched with a key-value cache, padded left. A text ends with its first end-of-sequence, or without one at the token
    limit. Draws from no generator that training uses. Ranks call it together and get the samples of rank 0, which are
    those of one process: every rank writes all of them.
    """
    device = next(model.parameters()).device
    rows = [prompt for prompt in plan.prompts for _ in range(plan.per_prompt)]
    written: list[Ids] = []
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _writing(model, plan), gathered_once(model):
        torch.manual_seed(plan.seed)
        for batch in _batches(rows, plan):
            width = max(map(len, batch))
            ids = torch.tensor([[plan.eos_token_ids[0]] * (width - len(row)) + row for row in batch], device=device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
            with objective.precision(device):
                # ranks that share the weights run as many forwards as one another, whatever they write
                out = model.generate(ids, attention_mask=mask, synced_gpus=is_sharded(model))
            written += [_cut(row, plan) for row in out[:, width:].tolist()]
    agreed = on_main(lambda: written)
    return [agreed[k : k + plan.per_prompt] for k in range(0, len(agreed), plan.per_prompt)]


@contextmanager
def _writing(model: Any, plan: SamplePlan) -> Iterator[None]:
    """The model's own attention, a cache, and sampling from its own distribution whatever the checkpoint suggests."""
    settings = GenerationConfig(
        do_sample=plan.temperature > 0,
        temperature=plan.temperature or 1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=plan.max_tokens,
        eos_token_id=list(plan.eos_token_ids),
        pad_token_id=plan.eos_token_ids[0],
        use_cache=True,
    )
    before = model.generation_config
    model.generation_config = settings
    model.config.use_cache = True
    try:
        with in_evaluation(model), stock_attention(model):
            yield
    finally:
        model.config.use_cache = False
        model.generation_config = before


def _batches(rows: Sequence[Ids], plan: SamplePlan) -> Iterator[Sequence[Ids]]:
    """Rows in order, as many at a time as the token budget holds when all are full (at least one)."""
    longest = max(map(len, rows)) + plan.max_tokens
    size = max(plan.token_budget // longest, 1)
    for k in range(0, len(rows), size):
        yield rows[k : k + size]


def _cut(ids: Ids, plan: SamplePlan) -> Ids:
    ends = [k for k, token in enumerate(ids) if token in plan.eos_token_ids]
    return ids[: ends[0] + 1] if ends else ids


@torch.no_grad()
def sample_logps(model: Any, plan: SamplePlan, samples: Sequence[Sequence[Ids]], objective: Objective) -> list[float]:
    """Log-prob of every sample at the sampling temperature, prompt by prompt, through the packed forward; [P * S]."""
    device = next(model.parameters()).device
    groups = [Group(p, list(y), (), row=k) for k, (p, y) in enumerate(zip(plan.prompts, samples, strict=True))]
    longest = max(len(group.prompt) + max(map(len, group.completions)) for group in groups)
    budget = max(plan.token_budget, longest)
    parts = [(k, part) for k, group in enumerate(groups) for part in split_group(group, budget, plan.layout)]
    found: dict[tuple[int, int], float] = {}
    with in_evaluation(model):
        for members in plan_groups([part.group for _, part in parts], budget, plan.layout).bins:
            batch = pack([parts[m][1].group for m in members], layout=plan.layout).to(device)
            with objective.precision(device):
                logps = shared_logps(model, batch, temperature=plan.temperature, backend=objective.backend)
            keys = [(parts[m][0], c) for m in members for c in parts[m][1].completions]
            found.update(zip(keys, logps.completion_logps.tolist(), strict=True))
    return [found[key] for key in sorted(found)]


def estimate_kl(log_ratios: Sequence[float], per_prompt: int) -> KL:
    """KL(policy || reference) = E_policy[log policy - log reference], from samples prompt by prompt.

    Samples of one prompt are not independent of each other: the standard error is over the means of the prompts, or
    over the samples where there is one prompt.
    """
    means = [fmean(log_ratios[k : k + per_prompt]) for k in range(0, len(log_ratios), per_prompt)]
    spread = means if len(means) > 1 else list(log_ratios)
    error = stdev(spread) / math.sqrt(len(spread)) if len(spread) > 1 else None
    return KL(fmean(means), error)
