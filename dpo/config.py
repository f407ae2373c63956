"""Every setting of a run: the flags of `dpo` are these fields, `--config` reads them from YAML."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dpo.comparisons import Comparisons, Kind
from dpo.errors import UserError
from dpo.lossflags import LossConfig

OptimizerName = Literal[
    "rmsprop", "adamw", "adam", "nadam", "radam", "adamax", "adagrad", "adadelta", "adafactor", "sgd", "asgd", "rprop"
]
"""RMSprop as the paper has it, and torch's by name."""
Layout = Literal["shared", "packed", "padded"]
"""shared: [prompt | y_1 | ... | y_K]; packed: the prompt repeated before every completion, no padding; padded: one a
row, padded right."""


def require(condition: bool, flag: str, expected: str, found: object) -> None:
    if not condition:
        raise UserError(f"{flag}: expected {expected}, found {found}")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """What training and scoring have in common: a model, preference data, and how they run."""

    model: str
    """The policy: a Hugging Face model id or a folder."""
    adapter: str | None = None
    """A LoRA adapter (a folder that peft wrote) to put on --model.
    dpo train goes on with it, and a frozen copy of it is the reference."""
    data: str
    """Preference data: a .jsonl, .json, .csv or .parquet file, a dataset folder, or a dataset id."""
    config: str | None = None
    """A YAML file of these settings, one `name: value` a line. Flags win over it."""
    data_split: str | None = None
    """The split of --data, such as train or train[:90%]. None: train, or the only one."""
    max_prompt_length: int | None = 1024
    """Longer prompts lose tokens on the left. None: no limit."""
    max_completion_length: int | None = 1024
    """Longer completions lose tokens on the right, their end-of-sequence with them. None: no limit."""
    comparisons: Kind = "all"
    """What is compared of several scored or ranked completions a prompt.
    all: every two that differ. best-vs-worst, best-vs-rest: only these.
    adjacent: neighbours by score. random: one pair, fixed by the seed.
    ranking: Plackett-Luce over all of them."""
    min_score_gap: float = 0.0
    """Compare completions whose scores (or ranks) differ by this much or more; the rest is left out and counted."""
    ranking_top_k: int | None = None
    """With --comparisons ranking: only the first so many places are choices, the rest is worse. None: all places."""
    merge_prompts: bool = True
    """Rows of a file of pairs that have the same prompt become one group, which computes the prompt once."""
    max_bad_fraction: float = 0.05
    """Stop when more than this fraction of the rows cannot be used; the rest is dropped and reported."""
    beta: float = 0.1
    """Strength of the pull to the reference: a reward is beta times the log ratio of policy to reference."""
    token_budget: int = 8192
    """Tokens a forward pass may hold. It decides memory and speed, never the result."""
    share_prefix: bool = True
    """Compute a prompt once for all of its completions. Off: packed without sharing."""
    padded: bool = False
    """One completion a row, padded, with stock attention: for models that cannot be packed, and as a baseline."""
    check_sharing: bool = True
    """First compare the packed forward with plain forwards of the same weights, on part of the first step."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the forward and backward: fp32, or bf16 or fp16 autocast, fp16 with dynamic loss scaling."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes CUDA where it is found."""
    head_plan: Literal["auto", "frozen", "retain", "recompute"] = "auto"
    """How the LM head trades memory for matrix products: see kernels/README.md."""
    head_workspace_mb: int | None = None
    """Memory for logits that the LM head may keep, in MiB. None: chosen by the kernels from the problem's size."""
    kernel_backend: Literal["auto", "torch", "triton"] = "auto"
    """Implementation of the loss kernels. auto: the best for the device."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_completion_length", "head_workspace_mb"):
            value = getattr(self, name)
            require(value is None or value > 0, flag_of(name), "a positive number or None", value)
        require(self.token_budget > 0, "--token-budget", "a positive number of tokens", self.token_budget)
        require(0 < self.beta < math.inf, "--beta", "a positive number", self.beta)
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
class DataConfig(InputConfig):
    """What training and filling its reference cache have in common: which data are drawn how, and the reference."""

    eval_data: str | None = None
    """Held-out preference data, in any form that --data takes."""
    eval_split: str | None = None
    """The split of --eval-data, such as test. None: train, or the only one."""
    eval_fraction: float = 0.0
    """Without --eval-data: hold out this fraction of --data; equal prompts stay on one side."""
    pairs_per_step: int = 64
    """Pairs in an optimizer step (rankings, with --comparisons ranking). A prompt's pairs stay together."""
    groups_per_step: int | None = None
    """Prompts in an optimizer step, instead of --pairs-per-step."""
    reference_model: str | None = None
    """The reference. None: the policy as it is before training."""
    reference_cache: str | None = None
    """Folder of the reference's log-probs, shared by runs. None: fused-dpo/references in the user's cache folder."""
    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """How parameters are stored. bf16 needs --dtype bf16; see --bf16-update."""
    parallel: Literal["auto", "fsdp", "ddp"] = "auto"
    """Under torchrun: weights sharded over the ranks (FSDP2), or whole on each (DDP). auto: by what they take."""
    seed: int = 0
    """Seed of the order of the data, and of the held-out split."""

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
class TrainConfig(LossConfig, DataConfig):
    """Train a language model on preferences with Direct Preference Optimization."""

    output: str = "runs/dpo"
    """Folder of the run: config.yaml, metrics.jsonl, eval.jsonl, curves.png, model/, checkpoints/."""
    reduction: Literal["pairs", "prompts"] = "pairs"
    """What a step averages over: every pair (or ranking) alike, or every prompt alike whatever its number of pairs."""
    epochs: int | None = None
    """Passes over the data. None: one, or as many as --max-steps needs."""
    max_steps: int | None = None
    """Stop after this many steps, or after --epochs if that comes first."""
    optimizer: OptimizerName = "rmsprop"
    """The paper uses RMSprop."""
    optimizer_options: str | None = None
    """Further arguments of it as YAML, such as '{betas: [0.9, 0.95], eps: 1.0e-6}'."""
    lr: float = 1e-6
    """The largest learning rate, after warm-up."""
    schedule: Literal["paper", "linear", "cosine", "constant"] = "paper"
    """After warm-up the rate stays (paper) or falls (linear, cosine). constant: it stays, and there is no warm-up."""
    warmup_steps: int | None = None
    """Steps over which the learning rate rises linearly from zero. None: the paper's 150; 0 for --schedule constant."""
    lr_end: float | None = None
    """Where linear and cosine end, as a fraction of --lr. None: 0."""
    weight_decay: float = 0.0
    """Decoupled for AdamW, else as torch's optimizer of that name does it (added to the gradient)."""
    bf16_update: Literal["master", "random"] | None = None
    """Of --param-dtype bf16: fp32 master weights, or none and updates rounded at random. None: master."""
    ema: float | None = None
    """Evaluate and save as model/ the exponential moving average of the weights with this decay, such as 0.999."""
    grad_clip: float = 10.0
    """Clip the gradient to this global norm. 0: do not clip."""
    reference: Literal["auto", "cached", "online", "adapter-off", "none"] = "auto"
    """Where the reference's log-probs come from.
    cached: computed once and kept on disk.
    online: computed at every step by a second model.
    adapter-off: with LoRA, the policy's own weights without its adapter.
    none: nowhere, for losses that use none.
    auto: cached, or none where the loss uses none."""
    ref_update_every: int | None = None
    """Move the reference towards the policy every so many steps (TR-DPO). Needs --reference online."""
    ref_mix: float | None = None
    """How far --ref-update-every moves it: reference = mix * policy + (1 - mix) * reference. None: 0.6. 1: a copy."""
    two_phase: bool = False
    """Compute log-probs of the whole step before any gradient. Groups over --token-budget always go this way."""
    router_aux_loss: float = 0.0
    """Mixtures of experts: weight of the loss that balances their experts, over all tokens of a step. 0: none."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more arithmetic."""
    lora_r: int | None = None
    """Train a LoRA adapter of this rank instead of the weights. model/ is then the adapter."""
    lora_alpha: float | None = None
    """The adapter's product counts alpha / r. None: twice --lora-r."""
    lora_dropout: float = 0.0
    """Dropout before the adapter's products. The reference has none."""
    lora_targets: str = "all-linear"
    """Modules that get an adapter: all-linear (every linear layer but the LM head), or names with commas between."""
    lora_config: str | None = None
    """A peft configuration (adapter_config.json) instead of the --lora flags."""
    load_in_4bit: bool = False
    """Keep the linear weights under a LoRA adapter in 4 bits (NF4 of bitsandbytes). Needs CUDA."""
    dropout: bool = False
    """Keep the checkpoint's dropout. Off: zero, so that policy and reference agree exactly."""
    eval_every: int = 0
    """Evaluate every so many steps. 0: only before the first and after the last."""
    save_every: int = 0
    """Write a checkpoint every so many steps. 0: only the final model."""
    log_every: int = 10
    """Print a line every so many steps where there is no terminal for a progress bar. metrics.jsonl gets every step."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    best_metric: Literal["loss", "accuracy", "margin", "chosen_reward"] | None = None
    """Keep the checkpoint of the evaluation that is best by this; model/ becomes that one. loss: the lowest is best."""
    early_stop: int | None = None
    """Stop after so many evaluations in a row that are not better by --best-metric."""
    max_skipped: int = 5
    """Stop after this many updates in a row whose loss or gradient was not finite (each is skipped and reported)."""
    resume: Literal["never", "auto", "must"] = "never"
    """auto: go on from the newest checkpoint under --output, or start if there is none. must: stop if there is none."""
    overwrite: bool = False
    """Replace the run that --output holds."""
    log_to: tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...] | None = None
    """Live curves: tensorboard, wandb, trackio, several of them, or none. None: TensorBoard where it is installed."""
    sample_prompts: str | None = None
    """Write with policy and reference at every evaluation.
    A number takes so many prompts of the held-out data; otherwise a file:
    .txt with a prompt a line, or data with a field `prompt`."""
    samples_per_prompt: int = 1
    """Samples of each prompt."""
    sample_tokens: int = 128
    """Longest sample, in tokens."""
    sample_temperature: float = 1.0
    """Temperature of the samples and of the KL estimated from them. 0: the most likely token, and no KL."""
    push_to_hub: str | None = None
    """After training, upload model/ with its card to this repository, NAMESPACE/NAME."""
    hub_private: bool = False
    """Make the repository private, where --push-to-hub creates it."""
    data_workers: int | None = None
    """Processes that draw and pack batches. None: 0 on CPU, 2 on CUDA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = ("epochs", "max_steps", "lr", "log_every", "samples_per_prompt", "sample_tokens")
        for name in (*positive, "keep_checkpoints", "max_skipped", "early_stop"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, flag_of(name), "a positive number", value)
        unsigned = ("warmup_steps", "weight_decay", "grad_clip", "router_aux_loss", "eval_every", "save_every")
        for name in (*unsigned, "data_workers", "sample_temperature", "seed"):
            value = getattr(self, name)
            require(value is None or 0 <= value < math.inf, flag_of(name), "zero or more", value)
        if self.comparisons == "ranking":
            changed = [f for f in dataclasses.fields(LossConfig) if getattr(self, f.name) != f.default]
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
