"""Loss and gradient of a step do not depend on bins, layout, phases or where the reference comes from (float64)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from dpo.engine import forward_backward, forward_only
from dpo.loss import Objective
from dpo.model import prepare
from dpo.reference import CachedReference, OnlineReference
from dpo.steps import StepPlan, build_step
from dpo.train import enable_checkpointing
from tests.train.toy import GRAD_BOUND, LOGP_BOUND, float64_model, random_groups

CPU = torch.device("cpu")
BASE = StepPlan(token_budget=10_000)


def _run(plan: StepPlan, *, cached: bool = False, checkpointing: bool = False):
    model, reference = float64_model(0), float64_model(1)
    for network in (model, reference):
        prepare(network, plan.layout)
    if checkpointing:
        enable_checkpointing(model)
        model.train()
    groups = random_groups()
    objective = Objective(beta=0.3)
    step = build_step(groups, list(range(len(groups))), plan)
    ref_logps = OnlineReference(reference, objective)
    if cached:
        ref_logps = CachedReference()
        other = replace(plan, token_budget=10_000, two_phase=False)
        ref_logps.fill(reference, [build_step(groups, [i], other) for i in range(len(groups))], objective, CPU)
    result = forward_backward(model, step, ref_logps, objective)
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    forward = forward_only(model, step, ref_logps, objective)
    torch.testing.assert_close(forward.sums.sums, result.sums.sums, rtol=1e-9, atol=1e-9)
    return result.sums.read(), grads, len(step.all_bins)


@pytest.fixture(scope="module")
def base():
    return _run(BASE)


@pytest.mark.parametrize(
    ("plan", "options"),
    [
        (replace(BASE, token_budget=120), {}),
        (replace(BASE, token_budget=45), {}),
        (replace(BASE, two_phase=True, token_budget=120), {}),
        (replace(BASE, layout="packed"), {}),
        (replace(BASE, layout="padded", token_budget=200), {}),
        (replace(BASE, seed=3), {"cached": True}),
        (replace(BASE, token_budget=45), {"cached": True, "checkpointing": True}),
    ],
    ids=["bins", "split-groups", "two-phase", "packed", "padded", "cached", "split-cached-checkpointing"],
)
def test_loss_and_gradients_are_those_of_one_shared_bin(base, plan, options):
    means, grads, bins = _run(plan, **options)
    assert plan.token_budget == BASE.token_budget or bins > base[2]
    for name, value in base[0].items():
        assert means[name] == pytest.approx(value, rel=LOGP_BOUND, abs=LOGP_BOUND), name
    assert (grads - base[1]).norm() <= GRAD_BOUND * base[1].norm()


def test_reduction_prompts_changes_the_loss_and_is_invariant_too():
    plan = replace(BASE, reduction="prompts")
    # 36: groups of three and of six pairs go through the two-phase form, others of one and of six do not
    whole, parts = _run(plan), _run(replace(plan, token_budget=36))
    assert abs(whole[0]["loss"] - _run(BASE)[0]["loss"]) > 1e-4
    assert parts[0]["loss"] == pytest.approx(whole[0]["loss"], rel=LOGP_BOUND)
    assert (parts[1] - whole[1]).norm() <= GRAD_BOUND * whole[1].norm()


def test_the_loss_is_the_papers_formula(base):
    """Eq. 7, computed pair by pair from plain forwards, one sequence at a time."""
    model, reference = float64_model(0), float64_model(1)

    def logp(network: LlamaForCausalLM, prompt: list[int], completion: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = network(torch.tensor([[*prompt, *completion]])).logits[0].double()
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return rows.gather(1, torch.tensor(completion)[:, None]).sum()

    losses = []
    for group in random_groups():
        prompt = list(group.prompt)
        delta = [logp(model, prompt, list(y)) - logp(reference, prompt, list(y)) for y in group.completions]
        losses += [-torch.nn.functional.logsigmoid(0.3 * (delta[w] - delta[lo])) for w, lo in group.pairs]
    assert base[0]["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-7)
