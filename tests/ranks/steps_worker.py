"""One rank of a step on several, or all of it on one: python -m tests.ranks.steps_worker FILE CASE...

Each case's sums, gradients and weights after an update go to FILE (rank 0 writes).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from transformers import LlamaForCausalLM

from dpo import distributed
from dpo.adapters import add_adapter, lora_config
from dpo.balance import cost_of
from dpo.engine import evaluate, forward_backward
from dpo.loss import Objective
from dpo.model import prepare
from dpo.optim import apply_update, build_optimizer
from dpo.parallel import is_sharded, spread
from dpo.precision import Average, Weights
from dpo.reference import AdapterOffReference, CachedReference, OnlineReference
from dpo.steps import StepPlan, build_step, eval_steps
from dpo.train import enable_checkpointing
from tests.ranks import updates
from tests.train.toy import random_groups, toy_config, toy_mixture

CPU = torch.device("cpu")
OBJECTIVE = Objective(beta=0.3)


@dataclass(frozen=True)
class Case:
    """A step of nine groups, or of fewer than there are ranks."""

    how: Any = "fsdp"
    plan: StepPlan = StepPlan(token_budget=10_000)  # noqa: RUF009
    groups: int = 9
    cached: bool = False
    checkpointing: bool = False
    tied: bool = False
    optimizer: str = "rmsprop"
    lora: str | None = None
    """The modules that get an adapter; the reference is then the model without it."""
    ema: bool = False
    router: float = 0.0
    """Weight of the load-balancing loss: the model is then a mixture of experts."""

    @property
    def objective(self) -> Objective:
        return replace(OBJECTIVE, router_aux_loss=self.router)


_BASE = StepPlan(token_budget=10_000)
CASES = {
    "ddp": Case("ddp", replace(_BASE, token_budget=120)),
    "ddp-two-phase": Case("ddp", replace(_BASE, token_budget=45, two_phase=True), cached=True),
    "fsdp": Case(plan=replace(_BASE, token_budget=120), tied=True),
    "fsdp-split-groups": Case(plan=replace(_BASE, token_budget=45), cached=True, checkpointing=True),
    "fsdp-two-phase": Case(plan=replace(_BASE, token_budget=120, two_phase=True), optimizer="adamw"),
    "fsdp-padded": Case(plan=replace(_BASE, token_budget=200, layout="padded")),
    "fsdp-empty-bins": Case(groups=1, cached=True),
    "ddp-empty-bins": Case("ddp", groups=1),
    "fsdp-empty-coupled": Case(plan=replace(_BASE, two_phase=True), groups=1, cached=True),
    "fsdp-prompts": Case(plan=replace(_BASE, token_budget=120, reduction="prompts")),
    "fsdp-lora": Case(plan=replace(_BASE, token_budget=120), lora="all-linear", ema=True),
    "fsdp-lora-head": Case(
        plan=replace(_BASE, token_budget=45), lora="q_proj,embed_tokens,lm_head", checkpointing=True
    ),
    "ddp-lora": Case("ddp", replace(_BASE, token_budget=120, two_phase=True), lora="v_proj,lm_head"),
    "ddp-router": Case("ddp", replace(_BASE, token_budget=45, two_phase=True), router=5.0),
    "fsdp-router": Case(plan=replace(_BASE, token_budget=45, two_phase=True), checkpointing=True, router=5.0),
    "fsdp-empty-router": Case(plan=replace(_BASE, two_phase=True), groups=1, router=5.0),
}


@contextmanager
def counting_root() -> Iterator[dict[str, int]]:
    """How often embedding, final norm and LM head are gathered, and their gradients reduced, inside the block."""
    counts = {"gathers": 0, "reductions": 0}

    def counted(name: str, plain: Any) -> Any:
        def run(params: Any, *args: Any, **options: Any) -> Any:
            counts[name] += any("embed_tokens" in p._param_fqn for p in params)
            return plain(params, *args, **options)

        return run

    with ExitStack() as stack:
        for name, function in (("gathers", "foreach_all_gather"), ("reductions", "foreach_reduce")):
            plain = getattr(_fsdp_param_group, function)
            stack.enter_context(patch.object(_fsdp_param_group, function, counted(name, plain)))
        yield counts


def _model(seed: int, case: Case) -> Any:
    torch.manual_seed(seed)
    make = toy_mixture if case.router else lambda seed, **sizes: LlamaForCausalLM(toy_config(**sizes))
    model = make(seed, tie_word_embeddings=case.tied).double()
    model.config._experts_implementation = "eager"  # grouped products know no float64
    prepare(model, case.plan.layout)
    return model


def add_lora(model: LlamaForCausalLM, targets: str) -> None:
    """An adapter whose product is not 0, in float64."""
    torch.manual_seed(2)
    add_adapter(model, lora_config(4, targets=targets), "toy", "--lora-targets")
    model.double()
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.normal_(std=0.1)


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full else tensor).detach().flatten().clone()


def run_case(case: Case) -> dict[str, Any]:
    """Two steps with an update in between, and an evaluation, on however many ranks there are."""
    groups = random_groups(case.groups)
    model, reference, objective = _model(0, case), _model(1, case), case.objective
    reference.requires_grad_(False)
    if case.lora is not None:
        add_lora(model, case.lora)
    plan = replace(case.plan, ranks=distributed.ranks(), rank=distributed.rank(), cost=cost_of(model))
    if case.checkpointing:
        enable_checkpointing(model)
        model.train()
    spread(model, case.how, CPU)
    if case.lora is None:
        spread(reference, case.how, CPU)
    assert is_sharded(model) == (case.how == "fsdp" and distributed.ranks() > 1)
    step = build_step(groups, list(range(len(groups))), plan)
    ref_logps: Any = (
        OnlineReference(reference, OBJECTIVE) if case.lora is None else AdapterOffReference(model, OBJECTIVE)
    )
    if case.cached:
        ref_logps = CachedReference()
        # bins of another plan: what a rank looks up, another has computed
        others = [build_step(groups, [i], replace(plan, two_phase=False)) for i in range(len(groups))]
        ref_logps.fill(reference, others, OBJECTIVE, CPU)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(case.optimizer, trained, lr=1e-2)
    with counting_root() as root:
        first = forward_backward(model, step, ref_logps, objective)
    grads = torch.cat([_whole(p.grad) for p in model.parameters() if p.grad is not None])
    average = Average(trained, Weights(trained), decay=0.5)
    update = apply_update(optimizer, first.sums.loss, grad_clip=0.1)
    average.update()
    weights = torch.cat([_whole(p) for p in trained])
    averaged: dict[str, float] = {}
    if case.ema:
        with average.applied():
            assert not torch.equal(torch.cat([_whole(p) for p in trained]), weights)
            averaged = evaluate(model, eval_steps(groups, plan), ref_logps, objective, CPU)
        assert torch.equal(torch.cat([_whole(p) for p in trained]), weights)
    second = forward_backward(model, step, ref_logps, objective)
    return {
        "routers": first.routers,
        "root": root,
        "sums": first.sums.sums,
        "grads": grads,
        "grad_norm": update.grad_norm,
        "weights": weights,
        "second_sums": second.sums.sums,
        "evaluation": evaluate(model, eval_steps(groups, plan, groups_per_chunk=4), ref_logps, objective, CPU),
        "averaged": averaged,
        "bins": distributed.gathered(len(step.all_bins)),
        "empty": distributed.gathered(sum(not b.members for b in step.all_bins)),
        "tokens": step.num_tokens,
    }


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        results: dict[str, Any] = {name: run_case(CASES[name]) for name in names}
        results["updates"] = updates.results()
        if distributed.is_main():
            torch.save(results, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
