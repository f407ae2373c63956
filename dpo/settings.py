"""The flags of `dpo train`, `dpo cache` and `dpo score`, a class a topic: commands inherit those that they take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dpo.comparisons import Kind
from dpo.lossflags import LossFlags

OptimizerName = Literal[
    "rmsprop", "adamw", "adam", "nadam", "radam", "adamax", "adagrad", "adadelta", "adafactor", "sgd", "asgd", "rprop"
]
"""RMSprop as the paper has it, and torch's by name."""


@dataclass(frozen=True, kw_only=True)
class MainFlags:
    """What every run needs."""

    model: str
    """The policy: a Hugging Face model id or a folder."""
    adapter: str | None = None
    """A LoRA adapter (a folder that peft wrote) to put on --model.
    dpo train goes on with it, and a frozen copy of it is the reference."""
    data: str
    """Preference data: a .jsonl, .json, .csv or .parquet file, a dataset folder, or a dataset id."""
    config: str | None = None
    """A YAML file of these settings, one `name: value` a line. Flags win over it."""


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """Which rows and completions are used, and how much of each."""

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


@dataclass(frozen=True, kw_only=True)
class ForwardFlags:
    """How log-probs are computed."""

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


@dataclass(frozen=True, kw_only=True)
class HeldOutFlags:
    """Data to evaluate on."""

    eval_data: str | None = None
    """Held-out preference data, in any form that --data takes."""
    eval_split: str | None = None
    """The split of --eval-data, such as test. None: train, or the only one."""
    eval_fraction: float = 0.0
    """Without --eval-data: hold out this fraction of --data; equal prompts stay on one side."""


@dataclass(frozen=True, kw_only=True)
class StepFlags:
    """What is drawn for a step."""

    pairs_per_step: int = 64
    """Pairs in an optimizer step (rankings, with --comparisons ranking). A prompt's pairs stay together."""
    groups_per_step: int | None = None
    """Prompts in an optimizer step, instead of --pairs-per-step."""
    seed: int = 0
    """Seed of the order of the data, and of the held-out split."""


@dataclass(frozen=True, kw_only=True)
class ReferenceFlags:
    """What rewards are measured from."""

    reference_model: str | None = None
    """The reference. None: the policy as it is before training."""
    reference_cache: str | None = None
    """Folder of the reference's log-probs, shared by runs. None: fused-dpo/references in the user's cache folder."""


@dataclass(frozen=True, kw_only=True)
class MemoryFlags:
    """How weights are held."""

    param_dtype: Literal["fp32", "bf16"] = "fp32"
    """How parameters are stored. bf16 needs --dtype bf16; see --bf16-update."""
    parallel: Literal["auto", "fsdp", "ddp"] = "auto"
    """Under torchrun: weights sharded over the ranks (FSDP2), or whole on each (DDP). auto: by what they take."""


@dataclass(frozen=True, kw_only=True)
class OutputFlags:
    """Where the run goes."""

    output: str = "runs/dpo"
    """Folder of the run: config.yaml, metrics.jsonl, eval.jsonl, curves.png, model/, checkpoints/."""
    resume: Literal["never", "auto", "must"] = "never"
    """auto: go on from the newest checkpoint under --output, or start if there is none. must: stop if there is none."""
    overwrite: bool = False
    """Replace the run that --output holds."""


@dataclass(frozen=True, kw_only=True)
class RewardFlags:
    """What the loss is a function of."""

    beta: float = 0.1
    """Strength of the pull to the reference: a reward is beta times the log ratio of policy to reference."""


@dataclass(frozen=True, kw_only=True)
class TrainStepFlags:
    """How many steps, and what they average."""

    epochs: int | None = None
    """Passes over the data. None: one, or as many as --max-steps needs."""
    max_steps: int | None = None
    """Stop after this many steps, or after --epochs if that comes first."""
    reduction: Literal["pairs", "prompts"] = "pairs"
    """What a step averages over: every pair (or ranking) alike, or every prompt alike whatever its number of pairs."""
    two_phase: bool = False
    """Compute log-probs of the whole step before any gradient. Groups over --token-budget always go this way."""
    router_aux_loss: float = 0.0
    """Mixtures of experts: weight of the loss that balances their experts, over all tokens of a step. 0: none."""
    dropout: bool = False
    """Keep the checkpoint's dropout. Off: zero, so that policy and reference agree exactly."""
    data_workers: int | None = None
    """Processes that draw and pack batches. None: 0 on CPU, 2 on CUDA."""


@dataclass(frozen=True, kw_only=True)
class TrainReferenceFlags:
    """How the reference is had while training."""

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


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How gradients become updates."""

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
    grad_clip: float = 10.0
    """Clip the gradient to this global norm. 0: do not clip."""
    max_skipped: int = 5
    """Stop after this many updates in a row whose loss or gradient was not finite (each is skipped and reported)."""
    bf16_update: Literal["master", "random"] | None = None
    """Of --param-dtype bf16: fp32 master weights, or none and updates rounded at random. None: master."""
    ema: float | None = None
    """Evaluate and save as model/ the exponential moving average of the weights with this decay, such as 0.999."""


@dataclass(frozen=True, kw_only=True)
class TrainMemoryFlags:
    """What is computed again instead of kept."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more arithmetic."""


@dataclass(frozen=True, kw_only=True)
class LoraFlags:
    """Adapters instead of weights."""

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


@dataclass(frozen=True, kw_only=True)
class EvaluationFlags:
    """When to evaluate, and what follows from it."""

    eval_every: int = 0
    """Evaluate every so many steps. 0: only before the first and after the last."""
    best_metric: Literal["loss", "accuracy", "margin", "chosen_reward"] | None = None
    """Keep the checkpoint of the evaluation that is best by this; model/ becomes that one. loss: the lowest is best."""
    early_stop: int | None = None
    """Stop after so many evaluations in a row that are not better by --best-metric."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """What is kept on the way."""

    save_every: int = 0
    """Write a checkpoint every so many steps. 0: only the final model."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""


@dataclass(frozen=True, kw_only=True)
class LoggingFlags:
    """What is told on the way."""

    log_every: int = 10
    """Print a line every so many steps where there is no terminal for a progress bar. metrics.jsonl gets every step."""
    log_to: tuple[Literal["none", "tensorboard", "wandb", "trackio"], ...] | None = None
    """Live curves: tensorboard, wandb, trackio, several of them, or none. None: TensorBoard where it is installed."""


@dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """What the policy writes."""

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


@dataclass(frozen=True, kw_only=True)
class HubFlags:
    """Where the model is uploaded."""

    push_to_hub: str | None = None
    """After training, upload model/ with its card to this repository, NAMESPACE/NAME."""
    hub_private: bool = False
    """Make the repository private, where --push-to-hub creates it."""


@dataclass(frozen=True, kw_only=True)
class ScoreFlags:
    """What is scored, and where to."""

    reference: str
    """The model that rewards are measured from: an id or a folder, of a model or of a LoRA adapter."""
    beta: float = 0.1
    """A reward is beta times the log ratio of policy to reference."""
    output: str | None = None
    """A .jsonl file to write, a row a pair in input order. None: only the table."""
    overwrite: bool = False
    """Write over --output where it exists."""


@dataclass(frozen=True, kw_only=True)
class InputFlags(ForwardFlags, DataFlags, MainFlags):
    """What `dpo train`, `dpo cache` and `dpo score` have in common."""


@dataclass(frozen=True, kw_only=True)
class DrawFlags(MemoryFlags, ReferenceFlags, StepFlags, HeldOutFlags):
    """What `dpo train` and `dpo cache` have in common beside those."""


@dataclass(frozen=True, kw_only=True)
class TrainFlags(
    HubFlags,
    SampleFlags,
    LoggingFlags,
    CheckpointFlags,
    EvaluationFlags,
    LoraFlags,
    TrainMemoryFlags,
    OptimizerFlags,
    TrainStepFlags,
    TrainReferenceFlags,
    LossFlags,
    RewardFlags,
    OutputFlags,
):
    """What only `dpo train` takes."""


TOPICS: dict[str, tuple[type, ...]] = {
    "main": (MainFlags, ScoreFlags, OutputFlags),
    "data": (DataFlags,),
    "loss": (RewardFlags, LossFlags),
    "reference": (ReferenceFlags, TrainReferenceFlags),
    "optimizer": (OptimizerFlags,),
    "step": (StepFlags, TrainStepFlags),
    "evaluation": (HeldOutFlags, EvaluationFlags),
    "checkpoint": (CheckpointFlags,),
    "logging": (LoggingFlags,),
    "sample": (SampleFlags,),
    "lora": (LoraFlags,),
    "memory": (MemoryFlags, TrainMemoryFlags),
    "forward": (ForwardFlags,),
    "hub": (HubFlags,),
}
"""The boxes of `--help`, in order."""
