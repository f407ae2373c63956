"""The gradient of A.4, measured on real batches through the trainer's own step.

    grad L = -beta E[ sigmoid(r_l - r_w) (grad log pi(y_w) - grad log pi(y_l)) ]

T pairs, P parameters. The other side calls stock Transformers, one completion at a time, and none of our kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.data import load_preferences
from dpo.demo.run import load_pairs
from dpo.engine import StepResult, forward_backward
from dpo.loss import Objective
from dpo.model import prepare
from dpo.packing import Group
from dpo.reference import OnlineReference
from dpo.steps import StepPlan, build_step
from tests.packing.helpers import wide_softmax
from tests.train.toy import Groups, write_model

BETA = 0.3
COUNT = 12


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Any]:
    """Policy and reference with different weights, so that pairs are ordered rightly and wrongly by all margins."""
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for seed, name in enumerate(("policy", "reference")):
        write_model(folder / name, seed=seed, initializer_range=0.05)
        found[name] = AutoModelForCausalLM.from_pretrained(folder / name).double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy")
    found["groups"] = Groups(load_preferences(load_pairs()["train"][:COUNT], tokenizer, eos_token_ids=[1]))
    return found


def step(models: dict[str, Any], groups: Sequence[Group]) -> tuple[StepResult, Tensor]:
    """The trainer's forward and backward of a step, and its gradient [P]."""
    policy, objective = models["policy"], Objective(beta=BETA)
    for model in (policy, models["reference"]):
        prepare(model, "shared")
    policy.zero_grad()
    batch = build_step(Groups(groups), range(len(groups)), StepPlan(token_budget=300))
    assert len(groups) == 1 or len(batch.bins) > 1
    result = forward_backward(policy, batch, OnlineReference(models["reference"], objective), objective)
    return result, torch.cat([p.grad.flatten() for p in policy.parameters()])


def plain_logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Log-prob of one completion by the stock model."""
    prepare(model, "padded")
    ids = torch.tensor([[*prompt, *completion]])
    with wide_softmax():
        logps = model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    return logps[:-1].gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()


def direction(models: dict[str, Any], group: Group) -> tuple[Tensor, float]:
    """grad log pi(y_w) - grad log pi(y_l) [P], and sigmoid(r_l - r_w), of a group of one pair."""
    ((w, lost),) = group.pairs
    ratios = []
    for model in (models["policy"], models["reference"]):
        model.zero_grad()
        ratios.append(plain_logp(model, group.prompt, group.completions[w]))
        ratios[-1] = ratios[-1] - plain_logp(model, group.prompt, group.completions[lost])
    ratios[0].backward()
    wrong = torch.sigmoid(-BETA * (ratios[0] - ratios[1])).item()
    return torch.cat([p.grad.flatten() for p in models["policy"].parameters()]), wrong


def test_every_example_is_weighted_by_the_sigmoid_of_the_wrong_ordering(models):
    weights, margins, total = [], [], torch.zeros(())
    for group in models["groups"]:
        along, wrong = direction(models, group)
        result, gradient = step(models, [group])
        measured = -(gradient @ along) / (BETA * (along @ along))
        assert measured.item() == pytest.approx(wrong, abs=1e-6)
        # nothing but the weight tells the gradient from its direction
        assert (gradient + BETA * wrong * along).norm() < 1e-6 * gradient.norm()
        weights.append(measured.item())
        margins.append(result.sums.read()["margin"])
        total = total + gradient
    # a real spread: examples that the implicit reward orders wrongly weigh more than 1/2, the others less
    assert all((weight > 0.5) == (margin < 0) for weight, margin in zip(weights, margins, strict=True))
    assert min(weights) < 0.45
    assert max(weights) > 0.55
    # the gradient of a step of several bins is the mean over its examples
    _, whole = step(models, models["groups"])
    assert (whole - total / COUNT).norm() < 1e-6 * whole.norm()
