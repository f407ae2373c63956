"""The pair and ranking kernels against float64: values, rewards, gradients, order of programs, hard values."""

import itertools
import math

import pytest
import torch
from dpo_kernels import reference
from dpo_kernels.calls import PairCall
from dpo_kernels.tri import KernelCall, fixed
from dpo_kernels.tri.pairs import pair_backward, pair_forward
from dpo_kernels.tri.rankings import ranking_backward, ranking_forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.harness.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("interpreted")


def make(completions, pairs, *, spread=20.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    policy = torch.randn(completions, generator=generator) * spread - 100
    ref = policy + torch.randn(completions, generator=generator) * spread / 4
    index = torch.randint(0, completions, (2, pairs), generator=generator)
    return (
        policy,
        ref,
        index[0],
        index[1],
        torch.rand(pairs, generator=generator),
        torch.randn(pairs, generator=generator),
    )


def call(reduction="mean", beta=0.3, smoothing=0.0):
    return KernelCall.of(PairCall.check("sigmoid", beta, reduction, label_smoothing=smoothing))


@pytest.mark.parametrize(("completions", "pairs"), [(1, 1), (2, 1), (5, 4), (300, 700), (3, 0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pairs(completions, pairs, smoothing, weighted, reduction):
    policy, ref, chosen, rejected, weights, upstream = make(completions, pairs)
    weights = weights if weighted else None
    truth = policy.double().requires_grad_()
    wide = None if weights is None else weights.double()
    expected, won, lost = reference.pair_loss(
        truth,
        ref.double(),
        chosen,
        rejected,
        beta=0.3,
        label_smoothing=smoothing,
        reduction=reduction,
        pair_weights=wide,
    )
    work = torch.zeros(fixed.workspace_size(completions), dtype=torch.int64)
    with count_traffic() as traffic:
        found = pair_forward(policy, ref, chosen, rejected, weights, call(reduction, smoothing=smoothing), work=work)
    assert sum(traffic.launches.values()) == 1
    if reduction == "none":
        expected.backward(upstream.double())
        grad = pair_backward(found.slopes, upstream, chosen, rejected, completions, work=work)
        torch.testing.assert_close(found.losses.double(), expected.detach(), rtol=1e-6, atol=1e-12)
    else:
        expected.backward()
        grad = found.grad
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert truth.grad is not None
    torch.testing.assert_close(grad.double(), truth.grad, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.rewards[0].double(), won, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(found.rewards[1].double(), lost, rtol=1e-6, atol=1e-30)
    assert not work.any()


def test_golden_pair():
    """delta_w = 2, delta_l = -1, beta = 0.5: m = 1.5."""
    policy, ref = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -8.0])
    found = pair_forward(policy, ref, torch.tensor([0]), torch.tensor([1]), None, call(beta=0.5))
    p = 1.0 / (1.0 + math.exp(1.5))
    assert found.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)), rel=1e-7)
    assert found.grad.tolist() == pytest.approx([-0.5 * p, 0.5 * p], rel=1e-7)
    assert (found.rewards[0].item(), found.rewards[1].item()) == (1.0, -0.5)


def test_equal_models_give_exactly_ln_two_and_no_reward():
    policy, _, chosen, rejected, _, _ = make(6, 9)
    found = pair_forward(policy, policy.clone(), chosen, rejected, None, call())
    assert found.loss.item() == pytest.approx(math.log(2.0), rel=1e-7)
    assert not found.rewards[0].any()
    assert not found.rewards[1].any()


@pytest.mark.parametrize("margin", [-1e4, -100.0, -1e-8, 1e-8, 20.0, 100.0, 1e4])
def test_extreme_margins(margin):
    policy, ref = torch.tensor([margin, 0.0]), torch.zeros(2)
    found = pair_forward(policy, ref, torch.tensor([0]), torch.tensor([1]), None, call(beta=1.0))
    truth = -torch.nn.functional.logsigmoid(policy.double()[0])
    assert found.loss.item() == pytest.approx(truth.item(), rel=1e-6, abs=1e-40)
    assert found.grad[0].item() == pytest.approx(-torch.sigmoid(-policy.double()[0]).item(), rel=2e-6, abs=1e-40)


def test_infinities_mark_only_their_own_completions():
    policy, ref = torch.tensor([1.0, -torch.inf, 2.0, torch.nan]), torch.zeros(4)
    chosen, rejected = torch.tensor([0, 2, 3]), torch.tensor([1, 0, 2])
    work = torch.zeros(fixed.workspace_size(4), dtype=torch.int64)
    found = pair_forward(policy, ref, chosen, rejected, None, call("sum"), work=work)
    assert not work.any()
    assert found.losses[0] == 0.0
    assert found.losses[1].isfinite()
    assert found.losses[2].isnan()
    assert found.loss.isnan()
    assert found.grad[:2].isfinite().all()
    assert found.grad[2:].isnan().all()


def test_a_pair_of_weight_zero_counts_for_nothing_even_when_infinite():
    policy, ref = torch.tensor([-torch.inf, 0.0]), torch.zeros(2)
    found = pair_forward(policy, ref, torch.tensor([0]), torch.tensor([1]), torch.zeros(1), call())
    assert found.loss == 0.0
    assert found.grad.tolist() == [0.0, 0.0]


def test_an_index_outside_the_completions_is_nan_and_touches_nothing():
    policy, ref, *_ = make(3, 1)
    with count_traffic():
        found = pair_forward(policy, ref, torch.tensor([0, 3]), torch.tensor([1, -1]), None, call())
    assert found.losses[0].isfinite()
    assert found.losses[1].isnan()


def test_bf16_and_float64_inputs():
    policy, ref, chosen, rejected, _, _ = make(5, 4)
    for dtype in (torch.bfloat16, torch.float64):
        found = pair_forward(policy.to(dtype), ref.to(dtype), chosen, rejected, None, call())
        truth, _, _ = reference.pair_loss(policy.to(dtype).double(), ref.to(dtype).double(), chosen, rejected, beta=0.3)
        assert found.loss.item() == pytest.approx(truth.item(), rel=1e-6)


def plackett_luce(rewards, rankings, top):
    """The paper's A.3, by the definition: -sum_k [r_k - log sum_{j >= k} e^r_j]."""
    losses = []
    for ranking in rankings.tolist():
        places = [rewards[c] for c in ranking if c >= 0]
        terms = [torch.logsumexp(torch.stack(places[k:]), 0) - places[k] for k in range(min(top, len(places)))]
        losses.append(sum(terms, rewards.sum() * 0))
    return torch.stack(losses)


RANKINGS = [[0, 1, 2, 3], [3, 2, -1, -1], [4, -1, -1, -1], [-1, -1, -1, -1], [2, 4, 0, -1]]


@pytest.mark.parametrize("top", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("spread", [1.0, 400.0])
def test_rankings(top, reduction, spread):
    policy, ref, *_ = make(5, 1, spread=spread)
    rankings, upstream = torch.tensor(RANKINGS), torch.randn(5)
    truth = policy.double().requires_grad_()
    losses = plackett_luce(0.2 * (truth - ref.double()), rankings, top)
    work = torch.zeros(fixed.workspace_size(5), dtype=torch.int64)
    with count_traffic() as traffic:
        found = ranking_forward(policy, ref, rankings, 0.2, reduction, top, work=work)
    assert sum(traffic.launches.values()) == 1
    torch.testing.assert_close(found.losses.double(), losses.detach(), rtol=1e-6, atol=1e-6)
    if reduction == "none":
        losses.backward(upstream.double())
        grad = ranking_backward(found.slopes, upstream, rankings, 5, work=work)
    else:
        expected = losses.sum() if reduction == "sum" else losses.mean()
        expected.backward()
        assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
        grad = found.grad
    assert truth.grad is not None
    torch.testing.assert_close(grad.double(), truth.grad, rtol=2e-6, atol=2e-7)
    assert not work.any()


def test_a_ranking_of_two_is_a_pair():
    policy, ref, chosen, rejected, _, _ = make(6, 8)
    pairs = pair_forward(policy, ref, chosen, rejected, None, call(beta=0.2))
    ranking = ranking_forward(policy, ref, torch.stack([chosen, rejected], 1), 0.2, "mean", 2)
    assert ranking.loss.item() == pytest.approx(pairs.loss.item(), rel=1e-6)
    torch.testing.assert_close(ranking.grad, pairs.grad, rtol=1e-5, atol=1e-7)


def test_plackett_luce_probabilities_sum_to_one():
    policy, ref, *_ = make(4, 1, spread=3.0)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    found = ranking_forward(policy, ref, orders, 0.5, "none", 4)
    assert found.losses.double().neg().exp().sum().item() == pytest.approx(1.0, rel=1e-6)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_pairs(data):
    completions, pairs = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 9))
    place = st.lists(st.integers(0, completions - 1), min_size=pairs, max_size=pairs)
    numbers = st.lists(st.floats(-1e4, 1e4, width=32), min_size=completions, max_size=completions)
    policy, ref = torch.tensor(data.draw(numbers)), torch.tensor(data.draw(numbers))
    chosen, rejected = (torch.tensor(data.draw(place), dtype=torch.int64) for _ in range(2))
    truth = policy.double().requires_grad_()
    expected, _, _ = reference.pair_loss(truth, ref.double(), chosen, rejected, beta=0.3, reduction="sum")
    expected.backward()
    found = pair_forward(policy, ref, chosen, rejected, None, call("sum"))
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-30)
    assert truth.grad is not None
    torch.testing.assert_close(found.grad.double(), truth.grad, rtol=1e-6, atol=1e-7)
