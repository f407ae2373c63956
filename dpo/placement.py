"""From settings to where a run's models live: on one device, whole on every rank, or sharded over the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from dpo.balance import cost_of
from dpo.config import DataConfig
from dpo.console import say
from dpo.distributed import launched, rank, ranks
from dpo.errors import UserError
from dpo.inputs import Policy
from dpo.loss import Objective, token_logps
from dpo.packing import Group, pack
from dpo.parallel import choose, spread
from dpo.reference import store_frozen
from dpo.rng import seed_all
from dpo.steps import StepPlan

WHOLE_ONLY = {"adafactor", "rprop"}
"""Optimizers of torch's that write in place what depends on rows of other ranks, or index by masks: DTensor cannot."""


def place_policy(config: DataConfig, policy: Policy, objective: Objective, plan: StepPlan) -> tuple[Policy, StepPlan]:
    """Spreads the policy over the ranks, and has each rank pack its own bins.

    Raises:
        UserError: --parallel without torchrun, or with settings that it cannot do.
    """
    if not launched():
        if config.parallel != "auto":
            raise UserError(f"--parallel {config.parallel}: expected a run started by torchrun, found one process")
        return policy, plan
    how = choose(_wanted(config), policy.model, policy.device)
    _check(config, how)
    cost = cost_of(policy.model)
    if how == "fsdp" and getattr(config, "trains_adapter", False):
        store_frozen(policy.model, objective)  # before the ranks have parts
    place_model(policy.model, how, policy, objective)
    say(f"{ranks()} ranks, {how}")
    if getattr(config, "dropout", False):
        seed_all(config.seed, rank())
    return replace(policy, parallel=how), replace(plan, ranks=ranks(), rank=rank(), cost=cost)


def place_model(model: Any, how: str, policy: Policy, objective: Objective) -> None:
    """Spreads the policy, or a reference beside it, over the ranks."""
    if how == "none":
        return
    device, dummy = policy.device, pack([Group([0], [[0]], ())], layout=plan_layout(model))

    def probe() -> Any:
        return token_logps(model, dummy.to(device), objective).sum()

    spread(model, "fsdp" if how == "fsdp" else "ddp", device, compute=objective.autocast, probe=probe)


def plan_layout(model: Any) -> Any:
    """The layout that a model is prepared for."""
    from dpo.attention import ATTENTION

    return "shared" if model.config._attn_implementation == ATTENTION else "padded"


def _wanted(config: DataConfig) -> Literal["auto", "fsdp", "ddp"]:
    return "fsdp" if config.parallel == "auto" and _needs_fsdp(config) else config.parallel


def _needs_fsdp(config: DataConfig) -> bool:
    # adapters train in fp32 on bf16 weights too
    return config.param_dtype == "bf16" and not getattr(config, "trains_adapter", False)


def _check(config: DataConfig, how: str) -> None:
    if how == "ddp" and _needs_fsdp(config):
        raise UserError("--param-dtype bf16: expected --parallel fsdp (or one process), found ddp")
    optimizer = getattr(config, "optimizer", None)
    if how == "fsdp" and optimizer in WHOLE_ONLY:
        raise UserError(f"--optimizer {optimizer}: expected --parallel ddp (or one process), found fsdp")
