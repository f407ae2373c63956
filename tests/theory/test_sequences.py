"""The trainer's own step on a language model whose completions can be enumerated arrives at the exact optimum.

Vocabulary of 3, completions of 2 tokens: 9 completions a prompt, whose probabilities sum to 1. The reward is known, the
annotators answer by Bradley-Terry, and a group's pairs are weighted by how often each answer is given.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from dpo.engine import forward_backward
from dpo.loss import Objective
from dpo.model import prepare, shared_logps
from dpo.optim import apply_update, build_optimizer, set_lr
from dpo.packing import Group
from dpo.reference import CachedReference
from dpo.steps import StepBatch, StepPlan, build_step
from tests.train.toy import Groups, toy_config

# two different tokens a prompt: after equal tokens only, attention returns the same value at every position
PROMPTS, COMPLETIONS = [[0, 1], [1, 2], [2, 0]], list(product(range(3), repeat=2))
X, Y = len(PROMPTS), len(COMPLETIONS)
BETA, STEPS = 0.5, 150
PAIRS = list(permutations(range(Y), 2))


def model_of(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config(3, bos_token_id=None, eos_token_id=None, pad_token_id=None))
    prepare(model, "shared")
    return model


def log_probs(model: LlamaForCausalLM, step: StepBatch) -> Tensor:
    """[X, Y] float64."""
    with torch.no_grad():
        return torch.cat([shared_logps(model, b.batch).completion_logps for b in step.bins]).view(X, Y)


def annotated_step(reward: Tensor) -> StepBatch:
    """All prompts and pairs in one step, each pair weighted by the probability of its answer."""
    groups = Groups(Group(prompt, COMPLETIONS, PAIRS) for prompt in PROMPTS)
    step = build_step(groups, range(X), StepPlan(token_budget=80))
    (only,) = step.bins
    assert [group for group, _ in only.members] == list(range(X))
    assert only.batch.pair_weights is not None
    chosen, rejected = reward.flatten()[only.batch.chosen], reward.flatten()[only.batch.rejected]
    weights = torch.sigmoid(chosen - rejected) * only.batch.pair_weights
    return replace(step, bins=(replace(only, batch=replace(only.batch, pair_weights=weights)),))


def test_training_arrives_at_the_optimum_of_a_known_reward():
    reward = torch.randn(X, Y, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step, policy, objective = annotated_step(reward), model_of(0), Objective(beta=BETA)
    reference = CachedReference()
    reference.fill(policy, [step], objective, torch.device("cpu"))
    ref = log_probs(policy, step)
    torch.testing.assert_close(ref.exp().sum(-1), torch.ones(X, dtype=torch.float64), rtol=0, atol=1e-5)

    best = (ref + reward / BETA).log_softmax(-1)
    before = (best.exp() * (best - ref)).sum(-1)
    optimizer = build_optimizer("adamw", policy.parameters(), lr=1.0)
    for k in range(STEPS):
        set_lr(optimizer, 1e-2 * (1 - k / STEPS))
        result = forward_backward(policy, step, reference, objective)
        apply_update(optimizer, result.sums.loss, 10.0)
    found = log_probs(policy, step)
    away = (best.exp() * (best - found)).sum(-1)
    assert before.min() > 0.5
    assert away.max() < 1e-5

    value = (found.exp() * (reward - BETA * (found - ref))).sum(-1)
    log_z = (ref + reward / BETA).logsumexp(-1)
    assert (BETA * log_z - value).abs().max() < 1e-5
    # Theorem 1: the implicit reward is the reward, up to a function of the prompt
    offset = BETA * (found - ref) - reward
    assert (offset - offset.mean(-1, keepdim=True)).abs().max() < 0.01
