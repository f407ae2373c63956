"""From settings to a model, a tokenizer and data on a device: what training and scoring share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dpo_kernels.backends import triton_problem
from transformers.utils import logging as transformers_logging

from dpo.adapters import (
    add_adapter,
    base_of,
    config_from_file,
    is_adapter,
    load_adapter,
    load_reference,
    lora_config,
)
from dpo.baseline import RunningBaseline
from dpo.checks import check_sharing
from dpo.config import DataConfig, InputConfig, TrainConfig
from dpo.console import notice, say
from dpo.data import PreferenceData, load_preferences, split_off
from dpo.distributed import launched, local_rank
from dpo.errors import UserError
from dpo.load import eos_token_ids, load_model, load_tokenizer
from dpo.loss import Objective
from dpo.model import head_of, prepare
from dpo.router import experts_of
from dpo.steps import Preferences, StepPlan, build_step
from dpo.support import length_limit, refuse_data, refuse_dropout

AUTOCAST: dict[str, torch.dtype | None] = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What --dtype asks for."""

MOST_MERGED = 64
"""Pairs in one group of merged rows where there are no steps."""


@dataclass(frozen=True)
class Policy:
    """A model ready for packed batches, its tokenizer, and where it runs."""

    model: Any
    tokenizer: Any
    device: torch.device
    parallel: str = "none"
    """How ranks share the model: none, ddp or fsdp."""


def resolve_device(name: str) -> torch.device:
    """The device that --device names."""
    if launched() and torch.cuda.is_available() and name in ("auto", "cuda"):
        return torch.device("cuda", local_rank())
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device: expected auto, cpu, cuda or cuda:N, found {name}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: expected a CUDA device, found none")
    return device


def load_network(
    config: InputConfig, path: str, *, flag: str = "--model", dropout: bool = False, adapter: str | None = None
) -> Any:
    """A causal LM on the device, made ready for the layout: in fp32 unless --param-dtype says otherwise.

    Args:
        path: a model, or the folder of an adapter, which names its base.
        adapter: the folder of an adapter to put on the model.
    """
    adapter_flag = "--adapter"
    if adapter is None and is_adapter(path):
        path, adapter, adapter_flag = base_of(path, flag), path, flag
    transformers_logging.disable_progress_bar()
    dtype = torch.bfloat16 if isinstance(config, DataConfig) and config.param_dtype == "bf16" else torch.float32
    remote, four_bits = config.trust_remote_code, isinstance(config, TrainConfig) and config.load_in_4bit
    if four_bits and launched():
        raise UserError("--load-in-4bit: expected one process, found several (torchrun)")
    place = resolve_device(config.device) if four_bits else None
    model: Any = load_model(
        path, dtype=dtype, name=flag, trust_remote_code=remote, keep_dropout=dropout, in_4bit_on=place
    )
    if dropout:
        refuse_dropout(model, config.layout)
    if adapter is not None:
        load_adapter(model, adapter, path, adapter_flag)
    return _make_ready(config, model)


def _make_ready(config: InputConfig, model: Any) -> Any:
    # else see dpo.placement; weights in 4 bits are where they belong
    if not launched() and not getattr(model, "is_loaded_in_4bit", False):
        model.to(resolve_device(config.device))
    prepare(model, config.layout)
    return model


def check_kernels(config: InputConfig, model: Any) -> None:
    """Refuses a kernel backend that cannot run on the device, and a plan that cannot train the model's LM head."""
    device = resolve_device(config.device)
    dtype = AUTOCAST[config.dtype] or torch.float32
    problem = triton_problem(device.type, (dtype,)) if config.kernel_backend == "triton" else None
    if problem:
        raise UserError(f"--kernel-backend triton: {problem}")
    if config.head_plan == "frozen" and isinstance(config, TrainConfig) and head_of(model).trainable:
        raise UserError("--head-plan frozen: expected a model whose LM head is frozen, found one that trains")


def load_policy(config: InputConfig, path: str | None = None, *, dropout: bool = False) -> Policy:
    """The model at `path` (default: --model, with the adapter that the flags ask for) with its tokenizer."""
    if isinstance(config, TrainConfig) and is_adapter(config.model):
        base = base_of(config.model, "--model")
        raise UserError(
            f"--model {config.model}: expected a model, found an adapter: use --model {base} --adapter {config.model}"
        )
    start = path or config.adapter or config.model
    has_tokenizer = (Path(start) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        start if has_tokenizer or not is_adapter(start) else _base(config), trust_remote_code=config.trust_remote_code
    )
    if isinstance(config, TrainConfig):
        model = _load_trained(config, path, dropout)
    else:
        model = load_network(config, config.model, adapter=config.adapter)
    check_kernels(config, model)
    if isinstance(config, TrainConfig) and config.router_aux_loss:
        experts_of(model)
    return Policy(model, tokenizer, resolve_device(config.device))


def _base(config: InputConfig) -> str:
    return base_of(config.model, "--model") if is_adapter(config.model) else config.model


def _load_trained(config: TrainConfig, path: str | None, dropout: bool) -> Any:
    """The model that trains: from the start, or from `path`, which holds a model or the adapter that trained on it."""
    adapter = config.adapter if path is None else path if is_adapter(path) else None
    model = load_network(config, config.model if path is None or adapter else path, dropout=dropout, adapter=adapter)
    if getattr(model, "is_loaded_in_4bit", False) and not config.trains_adapter:
        raise UserError(f"--model {config.model}: expected --lora-r to train on weights of 4 bits, found none")
    if path is None and config.lora_r is not None:
        settings = {"alpha": config.lora_alpha, "dropout": config.lora_dropout, "targets": config.lora_targets}
        add_adapter(model, lora_config(config.lora_r, **settings), config.model, "--lora-targets")
    elif path is None and config.lora_config is not None:
        add_adapter(model, config_from_file(config.lora_config, "--lora-config"), config.model, "--lora-config")
    if config.adapter is not None:
        load_reference(model, config.adapter, "--adapter")
    return _make_ready(config, model)


def load_data(
    config: InputConfig, policy: Policy, source: str, split: str | None, flag: str = "--data"
) -> PreferenceData:
    """Preference data within the limits; prints what was recognised and what was left out."""
    data = load_preferences(
        source,
        policy.tokenizer,
        split=split,
        max_prompt_length=config.max_prompt_length,
        max_completion_length=config.max_completion_length,
        eos_token_ids=eos_token_ids(policy.model, policy.tokenizer),
        max_bad_fraction=config.max_bad_fraction,
        comparisons=config.compared,
        merge=_most_merged(config) if config.merge_prompts else None,
        name=flag,
    )
    if config.compared.asks_for_scores and not data.scored and flag == "--data":
        asked = f"--comparisons {config.comparisons}" if config.comparisons != "all" else "--min-score-gap"
        raise UserError(f"{asked}: expected {flag} with scores or ranks, found {data.report.format}")
    refuse_data(policy.model, data.longest_sequences(), flag)
    for line in data.report.lines():
        say(line)
    data.check_tokens(policy.model.get_input_embeddings().weight.shape[0], flag)
    return data


def _most_merged(config: InputConfig) -> int:
    """Pairs in one group of merged rows: a step mixes four prompts or more, even where the data has few."""
    return max(1, config.pairs_per_step // 4) if isinstance(config, DataConfig) else MOST_MERGED


def load_train_and_eval(config: DataConfig, policy: Policy) -> tuple[PreferenceData, PreferenceData | None]:
    """Training data, and held-out data from --eval-data or --eval-fraction."""
    data = load_data(config, policy, config.data, config.data_split)
    if config.eval_data:
        return data, load_data(config, policy, config.eval_data, config.eval_split, "--eval-data")
    if config.eval_fraction:
        return split_off(data, fraction=config.eval_fraction, seed=config.seed)
    return data, None


def objective_of(config: InputConfig) -> Objective:
    """The objective that the flags ask for (scoring has no loss but its arithmetic)."""
    objective = Objective(
        top_k=config.ranking_top_k,
        autocast=AUTOCAST[config.dtype],
        head_plan=config.head_plan,
        workspace_bytes=None if config.head_workspace_mb is None else config.head_workspace_mb << 20,
        backend=None if config.kernel_backend == "auto" else config.kernel_backend,
    )
    if isinstance(config, TrainConfig):
        baseline = RunningBaseline(resolve_device(config.device)) if config.running_baseline else None
        objective = replace(objective, router_aux_loss=config.router_aux_loss)
        return replace(objective, loss=config.loss, beta=config.beta, options=config.loss_options, baseline=baseline)
    return objective


def plan_of(config: InputConfig, model: Any = None) -> StepPlan:
    """How steps are drawn and packed, for a model whose rotary scaling may keep sequences apart."""
    limit = None if model is None else length_limit(model)
    plan = StepPlan(token_budget=config.token_budget, layout=config.layout, length_limit=limit)
    if isinstance(config, DataConfig):
        drawn = {"pairs_per_step": config.pairs_per_step, "groups_per_step": config.groups_per_step}
        plan = replace(plan, **drawn, seed=config.seed)
    if isinstance(config, TrainConfig):
        two_phase = config.two_phase or config.needs_whole_step or config.router_aux_loss > 0
        plan = replace(plan, reduction=config.reduction, two_phase=two_phase)
    return plan


def check_budget(data: PreferenceData, plan: StepPlan) -> None:
    """Raises UserError if some prompt with one completion exceeds the budget, long before its step comes."""
    longest = max(range(len(data)), key=lambda i: data.lengths(i)[0] + max(data.lengths(i)[1]))
    build_step(data, [longest], plan)


def check_first_bin(config: InputConfig, model: Any, data: Preferences, groups: Sequence[int]) -> None:
    """Compares the packed forward with plain forwards of the same weights; raises UserError where they differ."""
    if not config.check_sharing or config.padded:
        return
    with objective_of(config).precision(resolve_device(config.device)):
        result = check_sharing(model, [data[i] for i in groups], config.layout)
    say(
        f"check: packed and plain forwards agree within {result.max_abs_error:.1e} a token"
        f" (tolerance {result.tolerance:.1e})"
    )


def warn_about_schedule(config: TrainConfig, steps: int) -> None:
    """Says so where the defaults cannot work."""
    if steps <= config.warmup:
        notice(
            f"--warmup-steps {config.warmup}: the run has {steps} steps, "
            f"so the learning rate never reaches {config.lr:g}"
        )
