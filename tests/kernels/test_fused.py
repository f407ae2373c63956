"""linear_dpo_loss, dpo_loss_from_logits and the modules: against float64, each other, and exactly zero margins."""

import math

import pytest
import torch
from dpo_kernels import (
    DPOLoss,
    LinearDPOLoss,
    dpo_loss_from_logits,
    linear_dpo_loss,
    linear_token_logps,
    reference,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_helpers import gradient, leaf


def problem(dtype=torch.float64, rows=30, vocabulary=50, width=8, completions=5):
    hidden, weight = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    ids = torch.randint(completions, (rows,))
    targets[3], ids[7] = -100, -1
    ref = torch.randn(rows).to(dtype) - 4
    pairs = torch.tensor([0, 2, 0, 4]), torch.tensor([1, 3, 3, 1])
    return hidden, weight, targets, ids, ref, pairs


def mask(ids, targets):
    return ids.where(targets != -100, -1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_matches_the_reference(reduction, smoothing):
    hidden, weight, targets, ids, ref, (chosen, rejected) = problem()
    weights = torch.rand(4, dtype=torch.float64)
    loss_options = {"beta": 0.2, "label_smoothing": smoothing, "reduction": reduction, "pair_weights": weights}
    logit_options = {"temperature": 0.7, "softcap": 9.0}
    ours, theirs = (leaf(hidden), leaf(weight)), (leaf(hidden), leaf(weight))
    ref_masked = ref.where(targets != -100, 0.0)
    truth = reference.linear_dpo_loss(
        *theirs, targets, mask(ids, targets), ref_masked, chosen, rejected, num_completions=5,
        logit_options=logit_options, **loss_options,
    )  # fmt: skip
    found = linear_dpo_loss(*ours, targets, ids, ref, chosen, rejected, **logit_options, **loss_options)
    for mine, right in zip(found, truth, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(found.loss.shape, dtype=torch.float64)
    found.loss.backward(upstream)
    truth[0].backward(upstream)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient(mine), gradient(right), rtol=1e-11, atol=1e-12)

    logits = leaf(hidden @ weight.T)
    from_logits = dpo_loss_from_logits(
        logits, targets, ids, ref, chosen, rejected, **logit_options, **loss_options
    )  # fmt: skip
    from_logits.loss.backward(upstream)
    for mine, right in zip(from_logits, found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(logits) @ weight, gradient(ours[0]), rtol=1e-11, atol=1e-12)


def test_per_completion_reference_and_none():
    hidden, weight, targets, ids, ref, (chosen, rejected) = problem()
    per_token = linear_dpo_loss(hidden, weight, targets, ids, ref, chosen, rejected)
    sums = reference.completion_sums(ref, mask(ids, targets), 5)
    per_completion = linear_dpo_loss(hidden, weight, targets, ids, sums, chosen, rejected)
    torch.testing.assert_close(per_token.loss, per_completion.loss)
    none = linear_dpo_loss(hidden, weight, targets, ids, None, chosen, rejected)
    zero = linear_dpo_loss(hidden, weight, targets, ids, torch.zeros(5), chosen, rejected)
    assert torch.equal(none.loss, zero.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policy_equal_to_reference_gives_exactly_zero_margins(dtype):
    """Reference without gradient, policy with, whatever the plan; thousands of tokens a completion."""
    hidden, weight, targets, ids, _, (chosen, rejected) = problem(dtype, rows=9000)
    with torch.no_grad():
        ref = linear_token_logps(hidden, weight, targets)
    for plan in ("retain", "recompute", "frozen"):
        found = linear_dpo_loss(
            leaf(hidden), leaf(weight, grad=plan != "frozen"), targets, ids, ref, chosen, rejected, plan=plan
        )
        assert (found.chosen_rewards == 0).all()
        assert (found.rejected_rewards == 0).all()
        assert found.loss.item() == pytest.approx(math.log(2.0), abs=1e-7)


def test_long_completions_keep_their_precision():
    """Two sums near -30000: in fp32 their difference would be wrong in the third digit."""
    targets = torch.zeros(40000, dtype=torch.int64)
    ids = torch.arange(40000) // 20000
    logits = torch.randn(40000, 3)
    ref = torch.randn(40000) * 0.01 + reference.token_logps(logits, targets)
    found = dpo_loss_from_logits(logits, targets, ids, ref, torch.tensor([0]), torch.tensor([1]), beta=1.0)
    lp = reference.token_logps(logits.double(), targets)
    delta = reference.completion_sums(lp - ref.double(), ids, 2)
    assert found.chosen_rewards.item() == pytest.approx(delta[0].item(), abs=2e-4)
    assert found.rejected_rewards.item() == pytest.approx(delta[1].item(), abs=2e-4)
    exact = reference.completion_sums(found.token_logps.double() - ref.double(), ids, 2)
    assert found.chosen_rewards.item() == pytest.approx(exact[0].item(), rel=1e-7)
    sums = reference.completion_sums(ref.double(), ids, 2)
    summed = dpo_loss_from_logits(logits, targets, ids, sums, torch.tensor([0]), torch.tensor([1]), beta=1.0)
    assert summed.chosen_rewards.item() == pytest.approx(exact[0].item(), rel=1e-6)


def test_golden_two_token_pair():
    """Logits (0, ln 3) and targets 1, 0: lp = ln 3/4, ln 1/4; no reference, beta 1: margin ln 3, loss ln 4/3.

    dL/dlp_w = -sigmoid(-ln 3) = -1/4, dL/dlp_l = +1/4; rows of onehot - p are (-1/4, 1/4) and (3/4, -3/4).
    """
    logits = torch.tensor([[0.0, math.log(3.0)]] * 2, dtype=torch.float64, requires_grad=True)
    won, lost = torch.tensor([0]), torch.tensor([1])
    found = dpo_loss_from_logits(logits, torch.tensor([1, 0]), torch.tensor([0, 1]), None, won, lost, beta=1.0)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(math.log(4.0 / 3.0), abs=1e-15)
    assert found.token_logps.tolist() == pytest.approx([math.log(0.75), math.log(0.25)], abs=1e-15)
    assert gradient(logits).flatten().tolist() == pytest.approx([1 / 16, -1 / 16, 3 / 16, -3 / 16], abs=1e-15)


def test_logits_gradient_is_g_times_onehot_minus_p():
    """Design: dL/dz_t = g_t (onehot - softmax), g_t = -+beta sigmoid(-m) of the token's completion."""
    logits, targets = leaf(torch.randn(6, 11), torch.float64), torch.randint(11, (6,))
    ids, ref = torch.tensor([0, 0, 0, 1, 1, -1]), torch.randn(6, dtype=torch.float64)
    found = dpo_loss_from_logits(logits, targets, ids, ref, torch.tensor([0]), torch.tensor([1]), beta=0.4)
    found.loss.backward()
    slope = 0.4 * torch.sigmoid(-(found.chosen_rewards - found.rejected_rewards))
    g = torch.tensor([-1.0, -1.0, -1.0, 1.0, 1.0, 0.0], dtype=torch.float64) * slope
    onehot = torch.nn.functional.one_hot(targets, 11)
    torch.testing.assert_close(gradient(logits), g[:, None] * (onehot - logits.detach().softmax(-1)))


def padded(dtype=torch.float64):
    """Four completions of up to six tokens; chosen are 0 and 1, rejected 2 and 3; labels as Transformers has them."""
    hidden, weight = torch.randn(4, 6, 8).to(dtype), torch.randn(20, 8).to(dtype)
    labels = torch.randint(20, (4, 6))
    labels[:, :2], labels[1, 4:], labels[3, 5:] = -100, -100, -100
    return hidden, weight, labels


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
def test_modules_on_padded_batches(linear, per_token):
    hidden, weight, labels = padded()
    keep = labels[:, 1:] != -100
    ref_tokens = torch.randn(4, 6, dtype=torch.float64)
    ref_sums = (ref_tokens[:, 1:] * keep).sum(1)
    theirs = leaf(hidden)
    lp = reference.token_logps((theirs @ weight.T)[:, :-1], labels[:, 1:])
    truth = reference.pair_loss(lp.sum(1), ref_sums, torch.tensor([0, 1]), torch.tensor([2, 3]), beta=0.3)
    truth[0].backward()
    ref = ref_tokens if per_token else ref_sums
    ours = leaf(hidden)
    if linear:
        found = LinearDPOLoss(0.3, shift=True)(ours, weight, labels, ref)
    else:
        found = DPOLoss(0.3, shift=True)(ours @ weight.T, labels, ref)
    found.loss.backward()
    for mine, right in zip(found[:3], truth, strict=True):
        torch.testing.assert_close(mine, right)
    torch.testing.assert_close(found.token_logps, lp.detach())
    torch.testing.assert_close(gradient(ours), gradient(theirs))


def test_modules_on_packed_rows():
    hidden, weight, targets, ids, ref, (chosen, rejected) = problem()
    plain = linear_dpo_loss(hidden, weight, targets, ids, ref, chosen, rejected, beta=0.2)
    packed = {"completion_ids": ids, "chosen": chosen, "rejected": rejected}
    assert torch.equal(LinearDPOLoss(0.2, plan="auto")(hidden, weight, targets, ref, **packed).loss, plain.loss)
    torch.testing.assert_close(DPOLoss(0.2)(hidden @ weight.T, targets, ref, **packed).loss, plain.loss)


def test_empty_batch():
    """A rank without a group runs a dummy: no rows, no pairs, loss 0, gradients of 0."""
    none = torch.zeros(0, dtype=torch.int64)
    hidden, weight = leaf(torch.randn(0, 4)), leaf(torch.randn(9, 4))
    found = linear_dpo_loss(hidden, weight, none, none, torch.zeros(0), none, none)
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert gradient(weight).abs().sum() == 0


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 25),
    completions=st.integers(2, 6),
    count=st.integers(1, 7),
    seed=st.integers(0, 2**20),
    plan=st.sampled_from(["retain", "recompute"]),
)
def test_any_packing(rows, completions, count, seed, plan):
    maker = torch.Generator().manual_seed(seed)
    wide = {"generator": maker, "dtype": torch.float64}
    hidden, weight = torch.randn(rows, 5, **wide), torch.randn(13, 5, **wide)
    targets = torch.randint(13, (rows,), generator=maker)
    targets = targets.where(torch.rand(rows, generator=maker) > 0.2, -100)
    ids = torch.randint(-1, completions, (rows,), generator=maker)
    ref = torch.randn(rows, **wide).where(targets != -100, 0.0)
    if rows == completions:
        ids = torch.arange(rows).where(targets != -100, -1)
        targets, ids = targets.clamp_min(0), torch.arange(rows)
    chosen, rejected = torch.randint(completions, (2, count), generator=maker)
    ours, theirs = (leaf(hidden), leaf(weight)), (leaf(hidden), leaf(weight))
    found = linear_dpo_loss(*ours, targets, ids, ref, chosen, rejected, plan=plan, num_completions=completions)
    truth = reference.linear_dpo_loss(
        *theirs, targets, mask(ids, targets), ref, chosen, rejected, num_completions=completions
    )
    found.loss.backward()
    truth[0].backward()
    torch.testing.assert_close(found.loss, truth[0], rtol=1e-12, atol=1e-13)
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient(mine), gradient(right), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_ids": torch.tensor([0, 1, 2])}, "completion_ids: expected entries in"),
        ({"completion_ids": torch.tensor([0, 1])}, "completion_ids: expected shape"),
        ({"ref_logps": torch.zeros(5)}, "ref_logps: expected shape"),
        ({"chosen": torch.tensor([2])}, "chosen: expected entries in"),
        ({"loss": "dpo"}, "loss: expected one of"),
        ({"label_smoothing": 0.7}, "label_smoothing: expected"),
        ({"num_completions": 3, "completion_ids": torch.tensor([0, 2, 1])}, "ref_logps: .* two readings differ"),
    ],
)
def test_errors(change, message):
    given = {
        "hidden": torch.zeros(3, 4),
        "weight": torch.zeros(5, 4),
        "targets": torch.tensor([0, 1, 2]),
        "completion_ids": torch.tensor([0, 1, 1]),
        "ref_logps": torch.zeros(3),
        "chosen": torch.tensor([0]),
        "rejected": torch.tensor([1]),
        "num_completions": 2,
    }
    with pytest.raises(ValueError, match=message):
        linear_dpo_loss(**(given | change))


def test_module_errors():
    with pytest.raises(ValueError, match="beta: expected"):
        DPOLoss(-1.0)
    with pytest.raises(ValueError, match="an even number of completions, found 3"):
        DPOLoss()(torch.zeros(3, 4, 5), torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="chosen: expected pairs with packed rows"):
        DPOLoss()(torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64))
