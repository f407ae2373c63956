"""One rank of a step on several, or all of it on one: python -m tests.ranks.steps_worker FILE CASE...

Each case's sums, gradients and weights after an update go to FILE (rank 0 writes).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dpo import distributed
from dpo.balance import cost_of
from dpo.engine import evaluate, forward_backward
from dpo.loss import Objective
from dpo.model import prepare
from dpo.optim import apply_update, build_optimizer
from dpo.parallel import is_sharded, spread
from dpo.reference import CachedReference, OnlineReference
from dpo.steps import StepPlan, build_step, eval_steps
from dpo.train import enable_checkpointing
from tests.train.toy import random_groups, toy_config

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
}


def _model(seed: int, layout: Any, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config(tie_word_embeddings=tied)).double()
    prepare(model, layout)
    return model


def _whole(tensor: Tensor) -> Tensor:
    full = getattr(tensor, "full_tensor", None)
    return (full() if full else tensor).detach().flatten().clone()


def run_case(case: Case) -> dict[str, Any]:
    """Two steps with an update in between, and an evaluation, on however many ranks there are."""
    groups = random_groups(case.groups)
    model, reference = _model(0, case.plan.layout, case.tied), _model(1, case.plan.layout, case.tied)
    reference.requires_grad_(False)
    plan = replace(case.plan, ranks=distributed.ranks(), rank=distributed.rank(), cost=cost_of(model))
    if case.checkpointing:
        enable_checkpointing(model)
        model.train()
    spread(model, case.how, CPU)
    spread(reference, case.how, CPU)
    assert is_sharded(model) == (case.how == "fsdp" and distributed.ranks() > 1)
    step = build_step(groups, list(range(len(groups))), plan)
    ref_logps: Any = OnlineReference(reference, OBJECTIVE)
    if case.cached:
        ref_logps = CachedReference()
        # bins of another plan: what a rank looks up, another has computed
        others = [build_step(groups, [i], replace(plan, two_phase=False)) for i in range(len(groups))]
        ref_logps.fill(reference, others, OBJECTIVE, CPU)
    optimizer = build_optimizer(case.optimizer, model.parameters(), lr=1e-2)
    first = forward_backward(model, step, ref_logps, OBJECTIVE)
    grads = torch.cat([_whole(p.grad) for p in model.parameters() if p.grad is not None])
    update = apply_update(optimizer, first.sums.loss, grad_clip=0.1)
    weights = torch.cat([_whole(p) for p in model.parameters()])
    second = forward_backward(model, step, ref_logps, OBJECTIVE)
    return {
        "sums": first.sums.sums,
        "grads": grads,
        "grad_norm": update.grad_norm,
        "weights": weights,
        "second_sums": second.sums.sums,
        "evaluation": evaluate(model, eval_steps(groups, plan, groups_per_chunk=4), ref_logps, OBJECTIVE, CPU),
        "bins": distributed.gathered(len(step.all_bins)),
        "empty": distributed.gathered(sum(not b.members for b in step.all_bins)),
        "tokens": step.num_tokens,
    }


def main(path: str, *names: str) -> None:
    torch.set_num_threads(1)
    with distributed.joined("cpu"):
        results = {name: run_case(CASES[name]) for name in names}
        if distributed.is_main():
            torch.save(results, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
