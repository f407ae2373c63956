"""Sizes of the experiment, and the methods that it compares."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training run: a loss of the registry, its strength, and after which steps to measure the policy."""

    method: str
    setting: str
    loss: str = "sigmoid"
    beta: float = 0.1
    options: dict[str, Any] = field(default_factory=dict)
    rankings: bool = False
    """Train on the order of a prompt's completions (Plackett-Luce) instead of on their pairs."""
    lr_factor: float = 1.0
    measure_after: tuple[float, ...] = (1.0,)
    """Fractions of the steps."""

    @property
    def name(self) -> str:
        return f"{self.method} {self.setting}".strip()


@dataclass(frozen=True)
class Settings:
    """Everything that a point depends on, beside its method and the seed."""

    name: str = "full"
    model: str | None = None
    """A pretrained model as the reference. None: a small Llama, fine-tuned on the snippets."""
    snippets: int = 10_000
    vocabulary: int = 2048
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    epochs: int = 3
    language_lr: float = 4e-3
    language_batch: int = 64
    prefix: str = "<|end|>"
    """Stands before every beginning: the end-of-sequence, as in fine-tuning."""
    prompt_tokens: int = 4
    """Tokens of a review's beginning."""
    max_new_tokens: int = 24
    prompts: int = 1024
    completions: int = 4
    prompts_per_step: int = 16
    optimizer: str = "rmsprop"
    lr: float = 2e-4
    warmup_steps: int = 8
    grad_clip: float = 10.0
    held_out: int = 250
    """Prompts that every point is measured on."""
    samples: int = 4
    """Samples of each of them."""
    betas: tuple[float, ...] = (3.0, 1.0, 0.3, 0.1)
    lower_rates: tuple[float, ...] = (0.3, 0.1)
    """Factors of the learning rate at which DPO of the smallest beta runs too."""
    ipo_betas: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)
    """IPO aims at log ratios of a pair that differ by 1 / (2 beta)."""
    best_of: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    rl_betas: tuple[float, ...] = (0.1, 0.03, 0.01, 0.003)
    rl_lr: float = 2e-4
    sweep: tuple[float, ...] = (0.125, 0.25, 0.5, 1.0)
    """Fractions of the steps at which the baselines without a beta are measured."""


FULL = Settings()
QUICK = replace(
    FULL,
    name="quick",
    snippets=600,
    vocabulary=512,
    hidden=32,
    layers=1,
    epochs=1,
    prompts=32,
    held_out=16,
    max_new_tokens=12,
    betas=(1.0, 0.1),
    lower_rates=(0.3,),
    ipo_betas=(0.1,),
    best_of=(1, 4),
    rl_betas=(0.1,),
    sweep=(1.0,),
)
SMOLLM2 = replace(
    FULL,
    name="smollm2",
    model="smollm2-135m-instruct",
    prefix="A sentence of a movie review:\n",
    prompts=160,
    prompts_per_step=4,
    optimizer="adamw",
    lr=2e-5,
    warmup_steps=4,
    best_of=(1, 2, 4, 8),
    rl_lr=1e-5,
    rl_betas=(0.1,),
)
"""SmolLM2-135M-Instruct as it is, without fine-tuning: hours on two cores."""
QUICK_SMOLLM2 = replace(
    SMOLLM2,
    name="quick-smollm2",
    prompts=8,
    held_out=4,
    samples=2,
    max_new_tokens=6,
    betas=(0.1,),
    lower_rates=(0.3,),
    ipo_betas=(0.1,),
    best_of=(1, 2),
    sweep=(1.0,),
)


UNLIKELIHOOD = (
    ("weight 0.1", 0.1, 1.0),
    ("weight 0.3", 0.3, 1.0),
    ("weight 1", 1.0, 1.0),
    ("weight 0.3, lr x0.3", 0.3, 0.3),
)
"""Name of a setting, weight, factor of the learning rate."""


def runs(settings: Settings) -> list[Run]:
    """Every training run with the project's own trainer."""
    least = min(settings.betas)
    found = [Run("DPO", f"beta {beta:g}", beta=beta) for beta in settings.betas]
    for factor in settings.lower_rates:
        found.append(Run("DPO, lower rate", f"beta {least:g}, lr x{factor:g}", beta=least, lr_factor=factor))
    for factor in (0.3, 1.0, 3.0):
        setting = f"lr x{factor:g}"
        found.append(Run("preferred-ft", setting, "sft", lr_factor=factor, measure_after=settings.sweep))
    for setting, alpha, factor in UNLIKELIHOOD:
        options = {"unlikelihood_alpha": alpha}
        run = Run("unlikelihood", setting, "unlikelihood", options=options, lr_factor=factor)
        found.append(replace(run, measure_after=settings.sweep))
    for beta in settings.ipo_betas:
        found.append(Run("IPO", f"beta {beta:g}", "ipo", beta, {"token_reduction": "sum"}))
    for beta in settings.betas:
        found.append(Run("cDPO", f"beta {beta:g}", beta=beta, options={"label_smoothing": 0.1}))
        found.append(Run("Plackett-Luce", f"beta {beta:g}", beta=beta, rankings=True))
    return found
