"""The paper's theory on a problem small enough to solve exactly: X prompts, Y completions each, everything enumerated.

A policy is a table [X, Y] of log-probs, a reward a table [X, Y]. The losses are those of `dpo_kernels`; expectations
over annotators are weights, so nothing is sampled. Sections are those of Rafailov et al. 2023 (arXiv:2305.18290).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from dpo_kernels import pair_loss, ranking_loss
from torch import Tensor

X, Y = 3, 4
BETAS = (0.1, 0.5, 2.0)
GRID = torch.arange(X * Y).view(X, Y)
"""Number of every completion: prompt * Y + completion."""
PAIRS = torch.stack([GRID[x, [w, lost]] for x in range(X) for w in range(Y) for lost in range(Y) if w != lost])
RANKINGS = torch.stack([GRID[x, list(order)] for x in range(X) for order in permutations(range(Y))])


def tables(seed: int) -> tuple[Tensor, Tensor]:
    """A reward and a reference's log-probs, both [X, Y] float64."""
    generator = torch.Generator().manual_seed(seed)
    reward, logits = torch.randn(2, X, Y, dtype=torch.float64, generator=generator)
    return reward, logits.log_softmax(-1)


def optimum(reward: Tensor, reference: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Log-probs [X, Y] of pi_ref exp(r / beta) / Z, and log Z [X] (eq. 4)."""
    unnormalised = reference + reward / beta
    log_z = unnormalised.logsumexp(-1)
    return unnormalised - log_z[:, None], log_z


def divergence(policy: Tensor, other: Tensor) -> Tensor:
    """KL [X] of tables of log-probs."""
    return (policy.exp() * (policy - other)).sum(-1)


def objective(policy: Tensor, reward: Tensor, reference: Tensor, beta: float) -> Tensor:
    """The KL-constrained objective of each prompt [X] (eq. 3)."""
    return (policy.exp() * reward).sum(-1) - beta * divergence(policy, reference)


def pair_losses(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Loss of every pair of PAIRS."""
    flat, ref = policy.flatten(), reference.flatten()
    return pair_loss(flat, ref, PAIRS[:, 0], PAIRS[:, 1], beta=beta, reduction="none").loss


def ranking_losses(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Loss of every ranking of RANKINGS."""
    return ranking_loss(policy.flatten(), reference.flatten(), RANKINGS, beta=beta, reduction="none").loss


def of_a_reward(losses: Callable[..., Tensor], reward: Tensor) -> Tensor:
    """Negative log-probability of every comparison under Bradley-Terry or Plackett-Luce of `reward`."""
    return losses(reward, torch.zeros_like(reward), 1.0)


def bradley_terry(reward: Tensor) -> Tensor:
    """Probability of every pair of PAIRS (eq. 1), by none of our losses."""
    strength = reward.exp().flatten()
    return strength[PAIRS[:, 0]] / (strength[PAIRS[:, 0]] + strength[PAIRS[:, 1]])


def plackett_luce(reward: Tensor) -> Tensor:
    """Probability of every ranking of RANKINGS (eq. 18): the best is chosen from all, the next from what is left."""
    strength = reward.exp().flatten()[RANKINGS]
    return torch.stack([strength[:, k] / strength[:, k:].sum(1) for k in range(Y)]).prod(0)


COMPARISONS = [(pair_losses, bradley_terry), (ranking_losses, plackett_luce)]
MODELS = pytest.mark.parametrize(("losses", "model"), COMPARISONS, ids=["bradley-terry", "plackett-luce"])


@pytest.mark.parametrize("beta", BETAS)
def test_the_optimum_of_the_constrained_objective(beta):
    """A.1: the best value is beta log Z, and any other policy falls short by beta KL(policy || optimum)."""
    reward, reference = tables(0)
    best, log_z = optimum(reward, reference, beta)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(X, dtype=torch.float64))
    torch.testing.assert_close(objective(best, reward, reference, beta), beta * log_z)
    for seed in range(1, 20):
        other = tables(seed)[1]
        short = beta * log_z - objective(other, reward, reference, beta)
        torch.testing.assert_close(short, beta * divergence(other, best))


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_ascent_on_the_objective_arrives_there(beta):
    reward, reference = tables(0)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -objective(logits.log_softmax(-1), reward, reference, beta).sum()
        value.backward()
        return value

    optimizer.step(loss)  # pyright: ignore[reportArgumentType]
    found = logits.detach().log_softmax(-1)
    best, _ = optimum(reward, reference, beta)
    torch.testing.assert_close(found.exp(), best.exp(), rtol=0, atol=1e-6)


@MODELS
def test_lemma_1_equivalent_rewards_induce_the_same_preferences(losses, model):
    """... and only they do: a reward that differs by more than a function of the prompt gives other preferences."""
    reward, _ = tables(0)
    shift = torch.tensor([[3.0], [-7.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(of_a_reward(losses, reward + shift), -model(reward).log())
    reward[1, 2] += 0.1
    assert (of_a_reward(losses, reward + shift) - of_a_reward(losses, tables(0)[0])).abs().max() > 0.01


@MODELS
def test_the_losses_are_probabilities_of_all_outcomes(losses, model):
    """exp(-loss) is the model's, and sums to 1 over the two orders of a pair, and over all rankings of completions."""
    reward, _ = tables(0)
    probabilities = torch.exp(-of_a_reward(losses, reward))
    torch.testing.assert_close(probabilities, model(reward))
    outcomes = X * Y * (Y - 1) // 2 if losses is pair_losses else X
    torch.testing.assert_close(probabilities.sum(), torch.tensor(float(outcomes), dtype=torch.float64))


def test_lemma_2_equivalent_rewards_induce_the_same_policy():
    reward, reference = tables(0)
    shift = torch.tensor([[3.0], [-7.0], [0.5]], dtype=torch.float64)
    torch.testing.assert_close(optimum(reward + shift, reference, 0.5)[0], optimum(reward, reference, 0.5)[0])
    assert divergence(optimum(2 * reward, reference, 0.5)[0], optimum(reward, reference, 0.5)[0]).min() > 0.01


@MODELS
@pytest.mark.parametrize("beta", BETAS)
def test_theorem_1_the_policy_gives_back_its_reward(losses, model, beta):
    """beta log(pi / pi_ref) of the optimum is the reward, less beta log Z(x), and says the same of every comparison."""
    reward, reference = tables(0)
    best, log_z = optimum(reward, reference, beta)
    implicit = beta * (best - reference)
    torch.testing.assert_close(implicit, reward - beta * log_z[:, None])
    torch.testing.assert_close(losses(best, reference, beta), -model(reward).log())
    # Proposition 1: of its class, it is the one reward that this parametrisation can express
    torch.testing.assert_close((reference + implicit / beta).logsumexp(-1), torch.zeros(X, dtype=torch.float64))


@MODELS
@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_dpo_by_gradient_descent_converges_to_the_optimum(losses, model, beta):
    """Annotators answer by the true model; DPO never sees the reward, only how often each answer is given."""
    reward, reference = tables(3)
    frequencies = model(reward)
    logits = reference.clone().requires_grad_()
    optimizer = torch.optim.SGD([logits], lr=0.5 / beta**2, momentum=0.9)
    for _ in range(400):
        optimizer.zero_grad()
        (frequencies * losses(logits.log_softmax(-1), reference, beta)).sum().backward()
        optimizer.step()
    found = logits.detach().log_softmax(-1)
    best, log_z = optimum(reward, reference, beta)
    torch.testing.assert_close(found, best, rtol=0, atol=1e-6)
    torch.testing.assert_close(beta * (found - reference), reward - beta * log_z[:, None], rtol=0, atol=1e-6)
    entropy = -(frequencies * frequencies.log()).sum()
    torch.testing.assert_close((frequencies * losses(found, reference, beta)).sum(), entropy)
