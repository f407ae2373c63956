"""A run's settings together, and what they ask of each other; `--config` reads them from YAML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dpo.comparisons import Comparisons
from dpo.errors import UserError
from dpo.lossflags import LossFlags
from dpo.settings import DrawFlags, InputFlags, TrainFlags

Layout = Literal["shared", "packed", "padded"]
"""shared: [prompt | y_1 | ... | y_K]; packed: the prompt repeated before every completion, no padding; padded: one a
row, padded right."""


def require(condition: bool, flag: str, expected: str, found: object) -> None:
    if not condition:
        raise UserError(f"{flag}: expected {expected}, found {found}")


@dataclass(frozen=True, kw_only=True)
class InputConfig(InputFlags):
    """What training and scoring have in common: a model, preference data, and how they run."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_completion_length", "head_workspace_mb"):
            value = getattr(self, name)
            require(value is None or value > 0, flag_of(name), "a positive number or None", value)
        require(self.token_budget > 0, "--token-budget", "a positive number of tokens", self.token_budget)
        _ = self.compared  # checks its flags
        require(0 <= self.max_bad_fraction <= 1, "--max-bad-fraction", "a fraction from 0 to 1", self.max_bad_fraction)

    @property
    def compared(self) -> Comparisons:
        """What --comparisons and the flags beside it ask for."""
        seed = getattr(self, "seed", 0)
        return Comparisons(self.comparisons, self.min_score_gap, self.ranking_top_k, seed)

    @property
    def layout(self) -> Layout:
        """The layout of the packed forward that --padded and --share-prefix ask for."""
        if self.padded:
            return "padded"
        return "shared" if self.share_prefix else "packed"


@dataclass(frozen=True, kw_only=True)
class DataConfig(DrawFlags, InputConfig):
    """What training and filling its reference cache have in common: which data are drawn how, and the reference."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("pairs_per_step", "groups_per_step"):
            value = getattr(self, name)
            require(value is None or value > 0, flag_of(name), "a positive number", value)
        require(0 <= self.eval_fraction < 1, "--eval-fraction", "0 <= value < 1", self.eval_fraction)
        same = self.eval_data == self.data and self.eval_split == self.data_split
        require(not same, "--eval-data", "other data or another --eval-split than --data", f"{self.eval_data} again")
        require(
            not (self.eval_data and self.eval_fraction), "--eval-fraction", "no --eval-data beside it", self.eval_data
        )
        bf16 = self.param_dtype == "fp32" or self.dtype == "bf16"
        require(bf16, "--param-dtype bf16", "--dtype bf16 beside it", self.dtype)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainFlags, DataConfig):
    """Train a language model on preferences with Direct Preference Optimization."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("beta", "epochs", "max_steps", "lr", "log_every", "samples_per_prompt", "sample_tokens")
        for name in (*positive, "keep_checkpoints", "max_skipped", "early_stop"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, flag_of(name), "a positive number", value)
        unsigned = ("warmup_steps", "weight_decay", "grad_clip", "router_aux_loss", "eval_every", "save_every")
        for name in (*unsigned, "data_workers", "sample_temperature", "seed"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, flag_of(name), "zero or more", value)
        if self.comparisons == "ranking":
            changed = [f for f in dataclasses.fields(LossFlags) if getattr(self, f.name) != f.default]
            for option in changed[:1]:
                expected = "the default beside --comparisons ranking, which does not use it"
                require(False, flag_of(option.name), expected, getattr(self, option.name))
        self._check_lora()
        reference = self.resolve_reference(self.reference, self.reference_model, self.reduction)
        object.__setattr__(self, "reference", reference)
        self._check_reference()
        self._check_update()
        held_out = bool(self.eval_data or self.eval_fraction)
        beside = "--eval-data or --eval-fraction beside it"
        if self.sample_prompts is not None:
            require(self.sample_prompts != "0", "--sample-prompts", "at least 1 prompt, or a file", 0)
            require(held_out, "--sample-prompts", beside, "neither")
        require(not self.best_metric or held_out, "--best-metric", beside, "neither")
        require(not self.early_stop or bool(self.best_metric), "--early-stop", "--best-metric beside it", "none")
        require(not self.hub_private or bool(self.push_to_hub), "--hub-private", "--push-to-hub beside it", "none")
        if self.log_to is not None and "none" in self.log_to:
            require(self.log_to == ("none",), "--log-to none", "nothing beside it", " ".join(self.log_to))

    @property
    def warmup(self) -> int:
        """Steps of warm-up, resolved."""
        if self.warmup_steps is None:
            return 0 if self.schedule == "constant" else 150
        return self.warmup_steps

    def _check_update(self) -> None:
        rises = self.schedule == "constant" and self.warmup_steps
        require(not rises, "--warmup-steps", "none with --schedule constant (paper has it)", self.warmup_steps)
        falls = self.schedule in ("linear", "cosine")
        require(falls or self.lr_end is None, "--lr-end", "--schedule linear or cosine beside it", self.schedule)
        require(self.lr_end is None or 0 <= self.lr_end <= 1, "--lr-end", "0 <= value <= 1", self.lr_end)
        bf16 = self.param_dtype == "bf16"
        require(bf16 or self.bf16_update is None, "--bf16-update", "--param-dtype bf16 beside it", self.param_dtype)
        require(self.ema is None or 0 < self.ema < 1, "--ema", "0 < value < 1", self.ema)
        self.parsed_optimizer_options()

    def parsed_optimizer_options(self) -> dict[str, Any]:
        """--optimizer-options as a mapping."""
        try:
            found = yaml.safe_load(self.optimizer_options or "{}")
        except yaml.YAMLError as error:
            raise UserError(f"--optimizer-options: expected YAML, found {_one_line(error)}") from error
        found = {} if found is None else found
        known = isinstance(found, dict) and all(isinstance(name, str) for name in found)
        require(known, "--optimizer-options", "a mapping such as '{eps: 1.0e-6}'", self.optimizer_options)
        return found

    def _check_reference(self) -> None:
        every = self.ref_update_every
        moves = every is not None
        require(every is None or every > 0, "--ref-update-every", "a positive number", every)
        require(not moves or self.reference == "online", "--ref-update-every", "--reference online", self.reference)
        require(moves or self.ref_mix is None, "--ref-mix", "--ref-update-every beside it", "none")
        require(self.ref_mix is None or 0 < self.ref_mix <= 1, "--ref-mix", "0 < value <= 1", self.ref_mix)

    def _check_lora(self) -> None:
        require(self.lora_r is None or self.lora_r > 0, "--lora-r", "a positive number", self.lora_r)
        require(
            self.lora_alpha is None or self.lora_alpha > 0, "--lora-alpha", "a positive number or None", self.lora_alpha
        )
        require(0 <= self.lora_dropout < 1, "--lora-dropout", "0 <= value < 1", self.lora_dropout)
        ways = {"--lora-r": self.lora_r, "--lora-config": self.lora_config, "--adapter": self.adapter}
        given = [flag for flag, value in ways.items() if value is not None]
        require(len(given) <= 1, " and ".join(given), "one of them", "both")
        for name, plain in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", "all-linear")):
            value = getattr(self, name)
            require(value == plain or self.lora_r is not None, flag_of(name), "--lora-r beside it", "none")
        expected = "--lora-r, --lora-config or --adapter beside it"
        require(bool(given) or not self.load_in_4bit, "--load-in-4bit", expected, "none")
        if self.reference == "adapter-off":
            require(bool(given), "--reference adapter-off", expected, "none")
            require(
                self.reference_model is None, "--reference adapter-off", "no --reference-model", self.reference_model
            )

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter trains, and not the model's own weights."""
        return any(value is not None for value in (self.lora_r, self.lora_config, self.adapter))


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def yaml_to_args(path: str, config: type) -> list[str]:
    """Settings of a YAML file as command-line words, so that one parser checks files and flags alike.

    Raises:
        UserError: the file cannot be read, is not a mapping, or names a setting that `config` does not have.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    # besides bad syntax: text that is not UTF-8, numbers of too many digits, and nesting too deep
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: expected a readable YAML file, found {_one_line(error)}") from error
    settings = {} if settings is None else settings
    if not isinstance(settings, Mapping):
        raise UserError(f"--config {path}: expected `name: value` lines, found a {type(settings).__name__}")
    known = {field.name for field in dataclasses.fields(config)} - {"config"}
    words: list[str] = []
    for name, value in settings.items():
        name = str(name).replace("-", "_")
        if name not in known:
            raise UserError(f"--config {path}: unknown setting {name!r}; known are {', '.join(sorted(known))}")
        if isinstance(value, bool):
            words.append(flag_of(name) if value else flag_of("no_" + name))
        elif name in _LISTS and isinstance(value, list):
            words += [flag_of(name), *map(str, value)]
        elif name == "optimizer_options" and isinstance(value, Mapping):
            words += [flag_of(name), yaml.safe_dump(dict(value), default_flow_style=True, width=1 << 20).strip()]
        elif isinstance(value, Sequence | Mapping) and not isinstance(value, str):
            raise UserError(f"--config {path}: {name}: expected one value, found a {type(value).__name__}")
        else:
            words += [flag_of(name), str(value)]
    return words


_LISTS = {"log_to"}
"""Settings that take several values."""


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):  # whose words depend on the caller's depth
        return "nesting too deep"
    return " ".join(str(error).split())


def to_yaml(config: Any) -> str:
    """The resolved settings as YAML that `--config` reads back."""
    return yaml.safe_dump(to_settings(config), sort_keys=False)


def defaults_of(config: type) -> dict[str, Any]:
    """The settings that have a default, by name, as `to_settings` gives them."""
    fields = [field for field in dataclasses.fields(config) if field.default is not dataclasses.MISSING]
    return {field.name: list(field.default) if isinstance(field.default, tuple) else field.default for field in fields}


def to_settings(config: Any) -> dict[str, Any]:
    """The resolved settings by name."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name != "config"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
