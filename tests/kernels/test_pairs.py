"""pair_loss and the paper's dpo_loss: hand-worked numbers, the paper's gradient formula, float64, errors."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dpo_kernels import dpo_loss, pair_loss, reference
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_helpers import gradient, leaf


def pairs(*index):
    return torch.tensor([i for i, _ in index]), torch.tensor([j for _, j in index])


def test_golden_pair():
    """delta_w = 2, delta_l = -1, beta = 0.5: m = 1.5, sigmoid(-1.5) = 1 / (1 + e^1.5)."""
    policy = torch.tensor([-3.0, -9.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-5.0, -8.0], dtype=torch.float64)
    found = pair_loss(policy, ref, *pairs((0, 1)), beta=0.5)
    found.loss.backward()
    p = 1.0 / (1.0 + math.exp(1.5))
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), abs=1e-15)
    assert (found.chosen_rewards.item(), found.rejected_rewards.item()) == (1.0, -0.5)
    assert gradient(policy).tolist() == pytest.approx([-0.5 * p, 0.5 * p], abs=1e-15)
    assert not found.chosen_rewards.requires_grad


def test_equal_models_give_ln_two():
    logps = torch.randn(6) * 1000
    found = pair_loss(logps, logps.clone(), *pairs((0, 1), (2, 3), (5, 4)))
    assert found.loss.item() == pytest.approx(math.log(2.0), abs=1e-7)
    assert (found.chosen_rewards - found.rejected_rewards == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
def test_gradient_is_the_papers(smoothing):
    """A.4: dL/dlp_w = -beta sigmoid(r_l - r_w); cDPO mixes in the same with w and l exchanged."""
    beta, index = 0.3, pairs((0, 1), (0, 2), (3, 2), (1, 4))
    policy, ref = leaf(torch.randn(5) * 20, torch.float64), torch.randn(5, dtype=torch.float64) * 20
    pair_loss(policy, ref, *index, beta=beta, label_smoothing=smoothing, reduction="sum").loss.backward()
    rewards = beta * (policy.detach() - ref)
    expected = torch.zeros(5, dtype=torch.float64)
    for w, lo in zip(*(part.tolist() for part in index), strict=True):
        forwards, backwards = torch.sigmoid(rewards[lo] - rewards[w]), torch.sigmoid(rewards[w] - rewards[lo])
        slope = -beta * ((1 - smoothing) * forwards - smoothing * backwards)
        expected[w] += slope
        expected[lo] -= slope
    torch.testing.assert_close(gradient(policy), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_matches_the_reference(reduction, weighted, dtype):
    policy, ref = (torch.randn(2, 9) * 30).to(dtype)
    index = pairs((0, 1), (2, 3), (2, 4), (8, 0), (5, 6))
    weights = torch.rand(5, dtype=torch.float64) if weighted else None
    options: dict[str, Any] = {"beta": 0.2, "label_smoothing": 0.05, "reduction": reduction, "pair_weights": weights}
    wide, ours = leaf(policy, torch.float64), leaf(policy)
    ref_grad = leaf(ref)
    truth = reference.pair_loss(wide, ref.double(), *index, **options)
    found = pair_loss(ours, ref_grad, *index, **options)
    upstream = torch.randn(truth[0].shape, dtype=torch.float64)
    truth[0].backward(upstream)
    found.loss.backward(upstream.to(found.loss.dtype))
    eps = torch.finfo(found.loss.dtype).eps
    for mine, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2 * eps, atol=2 * eps)
    close: dict[str, Any] = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 4 * eps}
    torch.testing.assert_close(gradient(ours).double(), gradient(wide), **close)
    torch.testing.assert_close(gradient(ref_grad), -gradient(ours), rtol=0, atol=0)


def test_extreme_margins_stay_finite():
    policy = leaf(torch.tensor([0.0, -1e6, -1e6, 0.0]))
    found = pair_loss(policy, torch.zeros(4), *pairs((0, 1), (2, 3)), reduction="none")
    found.loss.sum().backward()
    assert found.loss.tolist() == [0.0, pytest.approx(1e5)]
    assert gradient(policy).tolist() == pytest.approx([0.0, 0.0, -0.1, 0.1])


def test_no_pairs():
    policy = leaf(torch.randn(3))
    none = torch.zeros(0, dtype=torch.int64)
    found = pair_loss(policy, torch.zeros(3), none, none)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert gradient(policy).tolist() == [0.0] * 3


def test_weight_zero_silences_a_bad_pair():
    policy = leaf(torch.tensor([0.0, 1.0, float("nan"), 2.0]))
    weights = torch.tensor([1.0, 0.0])
    found = pair_loss(policy, torch.zeros(4), *pairs((0, 1), (2, 3)), pair_weights=weights, reduction="sum")
    found.loss.backward()
    assert found.loss.isfinite()
    assert gradient(policy).isfinite().all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20), completions=st.integers(2, 9), count=st.integers(1, 20), beta=st.floats(0.01, 5.0))
def test_any_pairs(seed, completions, count, beta):
    maker = torch.Generator().manual_seed(seed)
    policy = leaf(torch.randn(completions, generator=maker) * 50, torch.float64)
    wide = leaf(policy)
    ref = torch.randn(completions, generator=maker, dtype=torch.float64)
    chosen, rejected = torch.randint(completions, (2, count), generator=maker)
    pair_loss(policy, ref, chosen, rejected, beta=beta).loss.backward()
    reference.pair_loss(wide, ref, chosen, rejected, beta=beta)[0].backward()
    torch.testing.assert_close(gradient(policy), gradient(wide), rtol=1e-11, atol=1e-13)


def test_the_papers_function():
    """Appendix B's listing, written out."""
    policy, ref = leaf(torch.randn(6), torch.float64), torch.randn(6, dtype=torch.float64)
    chosen, rejected = pairs((0, 1), (2, 3), (4, 5))
    losses, rewards = dpo_loss(policy, ref, chosen, rejected, 0.1)
    ratios = (policy[chosen] - policy[rejected]) - (ref[chosen] - ref[rejected])
    torch.testing.assert_close(losses, -F.logsigmoid(0.1 * ratios))
    torch.testing.assert_close(rewards, 0.1 * (policy - ref).detach())
    assert losses.requires_grad
    assert not rewards.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "loss: expected one of sigmoid"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected"),
        ({"label_smoothing": -0.1}, "label_smoothing: expected"),
        ({"beta": 0.0}, "beta: expected"),
        ({"beta": float("nan")}, "beta: expected"),
        ({"reduction": "batch"}, "reduction: expected one of"),
        ({"chosen": torch.tensor([4])}, "chosen: expected entries in"),
        ({"rejected": torch.tensor([-1])}, "rejected: expected entries in"),
        ({"rejected": torch.tensor([1, 2])}, "rejected: expected shape"),
        ({"ref_logps": torch.zeros(3)}, "ref_logps: expected shape"),
        ({"policy_logps": torch.zeros(2, 2)}, "policy_logps: expected shape"),
        ({"pair_weights": torch.ones(2)}, "pair_weights: expected shape"),
    ],
)
def test_errors(change, message):
    given = {"policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4), "chosen": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        pair_loss(**(given | {"rejected": torch.tensor([1])} | change))
