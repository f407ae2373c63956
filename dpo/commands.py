"""The settings of every command but `dpo train`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from dpo.config import DataConfig, InputConfig, flag_of, require
from dpo.settings import ScoreFlags


@dataclass(frozen=True, kw_only=True)
class CacheConfig(DataConfig):
    """Fill the reference cache of a training run: takes the model and the data, and how they are drawn, as it does."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(ScoreFlags, InputConfig):
    """Score preference pairs: implicit rewards, margins and accuracy of a policy against its reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.beta < math.inf, "--beta", "a positive number", self.beta)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Add a LoRA adapter to its base model: a full checkpoint, loadable by plain Transformers."""

    adapter: str
    """The adapter: a folder that `dpo train` or peft wrote."""
    output: str
    """Where the merged model goes: a new folder."""
    model: str | None = None
    """The base model. None: the one that the adapter names."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the merged weights (the sum itself is fp32). auto: the base checkpoint's."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """Print every loss: formula, options with their values, what it needs, paper."""

    loss: str | None = None
    """Only these, such as ipo or sigmoid,sft. None: all."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Size a run: memory on each rank for a model, a batch and a mode, without loading anything."""

    model: str
    """A model id, a folder, a config.json, or 1b, 8b, 70b for a Llama of that size. Only the configuration is read."""
    token_budget: int = 8192
    """Tokens of a bin."""
    completion_share: float = 0.5
    """How many of a bin's tokens belong to completions, and reach the LM head."""
    bins: int = 2
    """Bins in a step of a rank. With one, gradients and activations are never whole at the same time."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Arithmetic, as of dpo train."""
    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """How parameters are stored, as of dpo train."""
    bf16_update: Literal["master", "random"] | None = None
    """Of --param-dtype bf16, as of dpo train. None: master."""
    optimizer: Literal["rmsprop", "adamw", "adam", "adagrad", "sgd"] = "rmsprop"
    """As of dpo train: those that need no memory of their own beside their states."""
    ema: float | None = None
    """As of dpo train. The average is held in fp32."""
    reference: Literal["cached", "online"] = "cached"
    """As of dpo train. online holds a second model; with LoRA adapter-off takes what cached does."""
    lora_r: int | None = None
    """As of dpo train."""
    lora_targets: str = "all-linear"
    """As of dpo train."""
    load_in_4bit: bool = False
    """As of dpo train."""
    gradient_checkpointing: bool = False
    """As of dpo train."""
    head_workspace_mb: int | None = None
    """As of dpo train."""
    ranks: int = 1
    """Processes, one a GPU."""
    parallel: Literal["auto", "fsdp", "ddp"] = "auto"
    """As of dpo train."""
    device: Literal["cuda", "cpu"] = "cuda"
    """What the run is for; none is needed here."""
    memory_gib: float = 80.0
    """Memory of a rank: decides --parallel auto, and what is said to fit."""
    json: bool = False
    """Print JSON, in bytes."""
    trust_remote_code: bool = False
    """Run configuration code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        for name in ("token_budget", "bins", "ranks", "memory_gib", "head_workspace_mb", "lora_r"):
            value = getattr(self, name)
            require(value is None or value > 0, flag_of(name), "a positive number", value)
        require(0 < self.completion_share <= 1, "--completion-share", "0 < value <= 1", self.completion_share)
        require(self.ema is None or 0 < self.ema < 1, "--ema", "0 < value < 1", self.ema)
        narrow, lora = self.param_dtype == "bf16", self.lora_r is not None
        require(not narrow or self.dtype == "bf16", "--param-dtype bf16", "--dtype bf16 beside it", self.dtype)
        require(narrow or not self.bf16_update, "--bf16-update", "--param-dtype bf16 beside it", self.param_dtype)
        require(lora or self.lora_targets == "all-linear", "--lora-targets", "--lora-r beside it", "none")
        require(lora or not self.load_in_4bit, "--load-in-4bit", "--lora-r beside it", "none")
        cuda = self.device == "cuda"
        require(cuda or not self.load_in_4bit, "--load-in-4bit", "a CUDA device", self.device)
        require(self.ranks == 1 or not self.load_in_4bit, "--load-in-4bit", "one process", f"--ranks {self.ranks}")
        wanted = f"--parallel {self.parallel}"
        require(self.ranks > 1 or self.parallel == "auto", wanted, "more than one of --ranks", self.ranks)
        whole = narrow and not lora and self.parallel == "ddp"
        require(not whole, "--param-dtype bf16", "--parallel fsdp (or one process)", "ddp")


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Train a tiny language model from scratch on real preferences, in under a minute on two cores."""

    output: str = "runs/demo"
    """Folder of the demo's run. A run that is there already is replaced if it is a demo's."""
    epochs: int = 2
    """Passes of preference training over the data."""
    seed: int = 0
    """Seed of the model, the order of the data and the samples."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write one HTML page about a run: curves, held-out pairs, samples, warnings, settings. It loads nothing."""

    run: Annotated[str, tyro.conf.Positional]
    """The run folder."""
    output: str | None = None
    """The file to write. None: report.html in the run folder."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Examine this machine: versions, devices, what would run and why, a self-test of the kernels, advice."""

    model: str | None = None
    """Also tell how this model would be packed and what it takes: an id or a folder. Loads no weights."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes CUDA where it is found."""
    json: bool = False
    """Print one JSON object instead of tables."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""
