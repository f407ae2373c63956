"""The work every side of the benchmark does: one small Llama, seeded preference pairs as token ids, three length mixes.

Shapes: T pairs a step, S tokens, V vocabulary, H hidden.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

EOS = 2
POPULATION = 512
"""Steps drawn, of which the few that are measured must be typical."""
FIRST_ORDINARY_TOKEN = 3
PAIRS_PER_STEP, PROMPTS_PER_STEP = 4, 1
"""Of mixes with two completions a prompt, and with more (whose six pairs are memory enough for other trainers)."""


@dataclass(frozen=True)
class Pair:
    """One comparison: token ids of the prompt and of both completions, each completion with its end-of-sequence."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass(frozen=True)
class LengthMix:
    """Log-normal lengths in tokens: median and sigma of the logarithm, for prompts and completions.

    completions: K of every prompt; a step holds all K (K - 1) / 2 pairs of a prompt.
    """

    name: str
    prompt_median: float
    prompt_sigma: float
    completion_median: float
    completion_sigma: float
    completions: int = 2

    @property
    def pairs_per_prompt(self) -> int:
        return math.comb(self.completions, 2)

    @property
    def pairs_per_step(self) -> int:
        return PAIRS_PER_STEP if self.completions == 2 else PROMPTS_PER_STEP * self.pairs_per_prompt

    def draw(self, steps: int, pairs_per_step: int, vocabulary: int, seed: int) -> list[list[Pair]]:
        """`steps` steps of `pairs_per_step` pairs that stand for the mix; a seed gives the same tokens everywhere.

        A few steps of heavy-tailed lengths can lie far from the mix's means. So `population` is cut into blocks of
        `steps`, and the block is taken whose mean token counts (padded, plain, shared, completion) are closest to the
        means of the whole population, by the sum of squared logarithms of their ratios.
        """
        every = self.population(pairs_per_step, vocabulary, seed)
        aim = describe(every)

        def distance(block: Sequence[Sequence[Pair]]) -> float:
            return sum(math.log(count / aim[name]) ** 2 for name, count in describe(block).items())

        return min((every[i : i + steps] for i in range(0, len(every) - steps + 1, steps)), key=distance)

    def population(self, pairs_per_step: int, vocabulary: int, seed: int) -> list[list[Pair]]:
        """`POPULATION` steps of the mix."""
        generator = torch.Generator().manual_seed(seed)

        def length(median: float, sigma: float) -> int:
            return max(1, round(median * math.exp(sigma * torch.randn((), generator=generator).item())))

        def tokens(count: int) -> list[int]:
            return torch.randint(FIRST_ORDINARY_TOKEN, vocabulary, (count,), generator=generator).tolist()

        def completion() -> list[int]:
            return [*tokens(length(self.completion_median, self.completion_sigma) - 1), EOS]

        def pairs() -> list[Pair]:
            prompt = tokens(length(self.prompt_median, self.prompt_sigma))
            ranked = [completion() for _ in range(self.completions)]
            return [Pair(prompt, better, worse) for better, worse in combinations(ranked, 2)]

        prompts = max(1, pairs_per_step // self.pairs_per_prompt)
        return [[pair for _ in range(prompts) for pair in pairs()] for _ in range(POPULATION)]


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the Llama that is trained; random weights, untied embeddings."""

    hidden: int = 512
    layers: int = 8
    heads: int = 8
    key_value_heads: int = 4
    intermediate: int = 1408
    vocabulary: int = 32000

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            max_position_embeddings=8192,
            pad_token_id=EOS,
            eos_token_id=EOS,
            tie_word_embeddings=False,
            attention_dropout=0.0,
            use_cache=False,
        )

    def build(self, seed: int = 0) -> LlamaForCausalLM:
        """The model in fp32, the same weights for the same seed."""
        torch.manual_seed(seed)
        return LlamaForCausalLM(self.config())


@dataclass(frozen=True)
class StepSettings:
    """Everything that is the same on every side."""

    model: ModelShape = field(default_factory=ModelShape)
    pairs_per_step: int = PAIRS_PER_STEP
    dtype: str = "fp32"
    """`fp32`, or `bf16` for autocast with fp32 parameters and fp32 optimizer state."""
    optimizer: str = "rmsprop"
    """`rmsprop` (the paper's) or `adamw`."""
    lr: float = 1e-6
    beta: float = 0.1
    grad_clip: float = 10.0
    threads: int = 2
    clock: str = "wall"
    """`wall`, or `cpu`: the process's seconds on its cores; with one thread it holds on a busy machine too."""
    products: str = "fastest"
    """fp32 matrix products of our sides and of the floor: the `fastest` routine that torch carries, or `torch`'s own
    choice, which TRL uses."""
    data_seed: int = 1

    def asdict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def timer(self) -> Callable[[], float]:
        return time.process_time if self.clock == "cpu" else time.perf_counter


GROUPS = LengthMix("groups", 120, 0.6, 120, 0.6, completions=4)
SUMMARISE = LengthMix("summarise", 170, 0.45, 18, 0.4)
CHAT = LengthMix("chat", 60, 0.9, 120, 0.7)
MIXES = {mix.name: mix for mix in (SUMMARISE, CHAT, GROUPS)}

TINY_MODEL = ModelShape(hidden=64, layers=2, heads=4, key_value_heads=2, intermediate=128, vocabulary=512)
TINY_MIXES = {
    "summarise": LengthMix("summarise", 17, 0.45, 4, 0.4),
    "chat": LengthMix("chat", 6, 0.9, 12, 0.7),
    "groups": LengthMix("groups", 12, 0.6, 12, 0.6, completions=4),
}


def describe(steps: Sequence[Sequence[Pair]]) -> dict[str, float]:
    """Mean token counts a step: what a padded batch of two rows a pair holds, what is in it, what sharing leaves (of a
    prompt and of a completion, once each)."""
    padded = plain = shared = targets = 0
    for step in steps:
        lengths = [len(p.prompt) + len(c) for p in step for c in (p.chosen, p.rejected)]
        padded += max(lengths) * len(lengths)
        plain += sum(lengths)
        # the pairs of a prompt hold the same lists
        prompts = {id(p.prompt): len(p.prompt) for p in step}
        completions = {id(y): len(y) for p in step for y in (p.chosen, p.rejected)}
        shared += sum(prompts.values()) + sum(completions.values())
        targets += sum(completions.values())
    totals = {"padded_tokens": padded, "plain_tokens": plain, "shared_tokens": shared, "completion_tokens": targets}
    return {name: round(total / len(steps), 1) for name, total in totals.items()}
