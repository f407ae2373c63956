"""Every loss and option on torch: values and gradients against autograd of the plain formula, numbers worked by hand,
Lemma 1, hard values, and options that a loss does not use.
"""

import math
from typing import Any

import pytest
import torch
from dpo_kernels import LOSSES, OPTIONS, PairCall, pair_loss, ranking_loss, reference
from dpo_kernels.losses import KERNEL_IDS
from dpo_kernels.reference_losses import FORMULAS
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_helpers import gradient, leaf
from tests.loss_cases import CASES, VALUES, label, problem


def both(loss, options, *, reduction="mean", weighted=False, seed=0):
    """(ours, its gradient), (the reference's, its gradient), float64."""
    given = problem(seed=seed)
    arguments = given.arguments(loss, options) | {"loss": loss, "beta": 0.3, "reduction": reduction}
    arguments |= {"pair_weights": given.weights if weighted else None}
    results = []
    for function in (pair_loss, reference.pair_loss):
        policy = leaf(given.policy)
        found = function(policy, chosen=given.chosen, rejected=given.rejected, **arguments)
        found[0].backward(given.upstream if reduction == "none" else None)
        results.append((found, gradient(policy)))
    return results


@pytest.mark.parametrize("case", CASES, ids=label)
def test_value_gradient_and_rewards(case):
    (ours, grad), (truth, expected) = both(*case)
    for mine, theirs in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_and_weights(loss):
    for reduction in ("sum", "none"):
        for weighted in (False, True):
            if LOSSES[loss].coupled == "batch" and (weighted or reduction == "none"):
                continue
            (ours, grad), (truth, expected) = both(loss, {}, reduction=reduction, weighted=weighted, seed=1)
            torch.testing.assert_close(ours[0], truth[0], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-13)


def test_the_cases_are_complete():
    assert FORMULAS.keys() == LOSSES.keys()
    used = {name for entry in LOSSES.values() for name in entry.options}
    assert used == OPTIONS.keys()
    assert used == VALUES.keys() | {"f_alpha", "ld_alpha", "ld_reference", "wpo"}
    assert KERNEL_IDS.keys() == {name for name, entry in LOSSES.items() if entry.coupled != "batch"}


# delta_w = 2, delta_l = -1 and beta 0.5: r_w = 1, r_l = -0.5, m = 1.5; lp_w = -3 of 4 tokens, lp_l = -9 of 3.
S = {x: 1.0 / (1.0 + math.exp(-x)) for x in (1.5, -1.5, 1.0, -1.0, 0.5, -0.5)}
K = 1.0 / (1.0 + math.exp(-30.0))
O_W, O_L = -0.75 - math.log(1 - math.exp(-0.75)), -3.0 - math.log(1 - math.exp(-3.0))
GOLDEN = {
    "sigmoid": (math.log1p(math.exp(-1.5)), -0.5 * S[-1.5], 0.5 * S[-1.5]),
    "robust": (
        (0.9 * math.log1p(math.exp(-1.5)) - 0.1 * math.log1p(math.exp(1.5))) / 0.8,
        -0.5 * (S[-1.5] + 0.125),
        0.5 * (S[-1.5] + 0.125),
    ),
    "hinge": (0.0, 0.0, 0.0),
    "ipo": ((2 / 4 + 1 / 3 - 1.0) ** 2, 2 * (5 / 6 - 1) / 4, -2 * (5 / 6 - 1) / 3),
    "nca_pair": (
        math.log1p(math.exp(-1.0)) + 0.5 * math.log1p(math.exp(1.0)) + 0.5 * math.log1p(math.exp(-0.5)),
        0.5 * (0.5 * S[1.0] - S[-1.0]),
        0.25 * S[-0.5],
    ),
    "bco_pair": (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-0.5)), -0.5 * S[-1.0], 0.5 * S[-0.5]),
    "sppo_hard": (1.0, 2.0, 0.0),
    "apo_zero": (S[-1.0] + S[-0.5], -0.5 * S[1.0] * S[-1.0], 0.5 * S[0.5] * S[-0.5]),
    "apo_down": (S[1.0] + S[-1.5], 0.5 * (S[1.0] * S[-1.0] - S[1.5] * S[-1.5]), 0.5 * S[1.5] * S[-1.5]),
    "sigmoid_norm": (
        math.log1p(math.exp(-5 / 12)),
        -0.125 / (1.0 + math.exp(5 / 12)),
        (0.5 / 3) / (1.0 + math.exp(5 / 12)),
    ),
    "simpo": (math.log1p(math.exp(-0.625)), -0.125 / (1 + math.exp(0.625)), 0.5 / 3 / (1 + math.exp(0.625))),
    "orpo": (
        0.75 + 0.5 * math.log1p(math.exp(O_L - O_W)),
        -0.25 - 0.125 / (1 + math.exp(O_W - O_L)) / (1 - math.exp(-0.75)),
        0.5 / 3 / (1 + math.exp(O_W - O_L)) / (1 - math.exp(-3.0)),
    ),
    "cpo": (math.log1p(math.exp(-3.0)) + 0.75, -0.5 / (1 + math.exp(3.0)) - 0.25, 0.5 / (1 + math.exp(3.0))),
    "unlikelihood": (3.0 - 9.0, -1.0, 1.0),
    "sft": (0.75, -0.25, 0.0),
}


@pytest.mark.parametrize("loss", GOLDEN)
def test_golden_numbers(loss):
    policy = leaf(torch.tensor([-3.0, -9.0]), torch.float64)
    call = PairCall.check(loss, 0.5, "mean")
    found = pair_loss(
        policy,
        torch.tensor([-5.0, -8.0], dtype=torch.float64) if call.reference else None,
        torch.tensor([0]),
        torch.tensor([1]),
        loss=loss,
        beta=0.5,
        lengths=torch.tensor([4, 3]) if call.lengths else None,
    )
    found.loss.backward()
    value, won, lost = GOLDEN[loss]
    assert found.loss.item() == pytest.approx(value, rel=1e-14, abs=1e-15)
    assert gradient(policy).tolist() == pytest.approx([won, lost], rel=1e-13, abs=1e-15)


def test_the_papers_baselines():
    """Unlikelihood raises log p(y_w) and lowers log p(y_l); Preferred-FT is maximum likelihood of y_w."""
    given, index = problem(), (torch.tensor([0, 3]), torch.tensor([1, 2]))
    w, lo = given.policy[index[0]], given.policy[index[1]]
    for alpha in (1.0, 0.25):
        found = pair_loss(given.policy, None, *index, loss="unlikelihood", unlikelihood_alpha=alpha, reduction="none")
        torch.testing.assert_close(found.loss, -(w - alpha * lo))
    found = pair_loss(given.policy, None, *index, loss="sft", token_reduction="sum", reduction="none")
    torch.testing.assert_close(found.loss, -w)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    shift=st.floats(-20.0, 20.0),
    case=st.sampled_from([c for c in CASES if "," not in c[0]]),
)
def test_lemma_1(seed, shift, case):
    """Adding f(x) to all rewards of a prompt changes nothing, for losses of a margin between plain log ratios alone."""
    loss, options = case
    given = problem(seed=seed)
    assert_shift(loss, options, given, torch.full_like(given.policy, shift))


def assert_shift(loss, options, given, shift):
    plain = options.get("f_divergence", "reverse_kl") == "reverse_kl"
    invariant = plain and LOSSES[loss].shift_invariant
    sums = loss in ("ipo", "cpo") and options.get("token_reduction") == "sum" and plain
    reduction = "sum" if LOSSES[loss].coupled == "batch" else "none"
    arguments = {"loss": loss, "chosen": given.chosen, "rejected": given.rejected, "reduction": reduction}
    arguments |= given.arguments(loss, options)
    before, after = (pair_loss(policy, **arguments).loss for policy in (given.policy, given.policy + shift))
    if invariant or (sums and (loss == "ipo" or options.get("cpo_alpha") == 0.0)):
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)
    return before, after


@pytest.mark.parametrize("loss", LOSSES)
def test_lemma_1_holds_exactly_where_the_table_says_so(loss):
    """The same shift of every reward, one prompt: invariant losses keep their value, each other one loses it."""
    given = problem()
    before, after = assert_shift(loss, {}, given, torch.full_like(given.policy, 1.7))
    kept = torch.allclose(before, after, rtol=1e-9, atol=1e-9)
    if loss == "cpo":
        assert not kept  # its likelihood term moves; without it the margin alone remains
        before, after = assert_shift(loss, {"cpo_alpha": 0.0}, given, torch.full_like(given.policy, 1.7))
        kept = torch.allclose(before, after, rtol=1e-9, atol=1e-9)
        assert kept
    elif loss == "unlikelihood":
        assert kept  # only with alpha 1, by which it is a margin: a loss without a bound, as the paper says of it
        before, after = assert_shift(loss, {"unlikelihood_alpha": 0.5}, given, torch.full_like(given.policy, 1.7))
        assert not torch.allclose(before, after, rtol=1e-9, atol=1e-9)
    elif loss == "aot_unpaired":
        assert kept  # one prompt; with two prompts below it is lost
    else:
        assert kept == LOSSES[loss].shift_invariant


def test_lemma_1_of_two_prompts():
    """Each prompt has its own f(x): pairs and rankings in a prompt keep their loss; sides sorted over both do not."""
    given = problem()
    within = given._replace(chosen=torch.tensor([0, 1, 2, 5, 6]), rejected=torch.tensor([3, 2, 3, 4, 7]))
    shift = torch.tensor([1.0, 1.0, 1.0, 1.0, -9.0, -9.0, -9.0, -9.0], dtype=torch.float64)
    for loss in ("sigmoid", "robust", "hinge", "exo_pair", "discopop", "aot"):
        before, after = assert_shift(loss, {}, within, shift)
        torch.testing.assert_close(before, after, rtol=1e-9, atol=1e-9)
    before, after = assert_shift("aot_unpaired", {}, within, shift)
    assert (before - after).abs().max() > 1e-3
    rankings = torch.tensor([[0, 2, 1, 3], [6, 4, 5, -1]])
    values = [ranking_loss(p, given.ref, rankings, reduction="none").loss for p in (given.policy, given.policy + shift)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), beta=st.floats(0.01, 3.0), top=st.sampled_from([None, 1, 2]))
def test_plackett_luce_of_two_is_bradley_terry(seed, beta, top):
    given = problem(seed=seed)
    ours, theirs = leaf(given.policy), leaf(given.policy)
    rankings = torch.stack([given.chosen, given.rejected], 1)
    ranked = ranking_loss(ours, given.ref, rankings, beta=beta, top_k=top)
    paired = pair_loss(theirs, given.ref, given.chosen, given.rejected, beta=beta)
    ranked.loss.backward()
    paired.loss.backward()
    torch.testing.assert_close(ranked.loss, paired.loss, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), shift=st.floats(-50.0, 50.0))
def test_lemma_1_of_plackett_luce(seed, shift):
    given = problem(seed=seed)
    rankings = torch.tensor([[0, 2, 1, 3], [6, 4, 5, -1]])
    values = [ranking_loss(p, given.ref, rankings).loss for p in (given.policy, given.policy + shift)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_hard_values_stay_finite(loss, size):
    """Log ratios far apart, both ways; divergences that overflow where the loss is flat."""
    policy = leaf(torch.tensor([-size - 1.0, -1.0]), torch.float64)
    ref = torch.tensor([-1.0, -size - 1.0], dtype=torch.float64)
    call = PairCall.check(loss, 0.1, "sum")
    index = torch.tensor([0, 1]), torch.tensor([1, 0])
    arguments: dict[str, Any] = {"lengths": torch.tensor([9, 5]) if call.lengths else None, "loss": loss}
    if loss == "alphapo":
        arguments["alphapo_alpha"] = 0.01
    found = pair_loss(policy, ref if call.reference else None, *index, **arguments)
    found.loss.backward()
    assert found.loss.isfinite()
    assert gradient(policy).isfinite().all()
    if "f_divergence" in LOSSES[loss].options:
        for kind in ("forward_kl", "js"):
            policy.grad = None
            pair_loss(policy, ref, index[0][1:], index[1][1:], f_divergence=kind, **arguments).loss.backward()
            finite = gradient(policy).isfinite().all()
            assert finite or (loss in ("ipo", "robust", "exo_pair", "discopop", "hinge") and size > 1e3)


def test_equal_models_have_no_margin():
    """Whatever the loss of log ratios, equal models give rewards of exactly 0."""
    given = problem()
    for loss, entry in LOSSES.items():
        if entry.reference:
            lengths = given.lengths if PairCall.check(loss, 0.1, "mean").lengths else None
            found = pair_loss(given.policy, given.policy, given.chosen, given.rejected, loss=loss, lengths=lengths)
            assert not found.chosen_rewards.any()
            assert not found.rejected_rewards.any()
            if loss in ("sigmoid", "aot", "aot_unpaired", "sigmoid_norm"):
                assert found.loss.item() == pytest.approx(math.log(2.0), abs=1e-15) or loss == "aot_unpaired"


@pytest.mark.parametrize("loss", [*LOSSES, "sigmoid:1,sft:0.1"])
def test_an_option_that_the_loss_does_not_use_is_refused(loss):
    names = [part.split(":")[0] for part in loss.split(",")]
    for option in OPTIONS:
        value = (VALUES | {"ld_alpha": [0.5], "ld_reference": [False], "wpo": [True], "f_alpha": [0.3]})[option][0]
        extra = {"f_alpha": {"f_divergence": "alpha"}, "ld_reference": {"ld_alpha": 0.5}}.get(option, {})
        used = any(option in LOSSES[name].options for name in names)
        if used:
            PairCall.check(loss, 0.1, "mean", **{option: value}, **extra)
        else:
            with pytest.raises(
                ValueError, match=f"({option}|{'|'.join(extra) or option}): loss '{loss}' does not use it"
            ):
                PairCall.check(loss, 0.1, "mean", **{option: value}, **extra)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "dpo"}, "loss: expected one of sigmoid, "),
        ({"loss": "sigmoid:x"}, "loss: expected a weight above 0 after sigmoid:"),
        ({"loss": "sigmoid:-1"}, "loss: expected a weight above 0"),
        ({"loss": "sigmoid,sigmoid"}, "loss: expected every loss once"),
        ({"loss": "sigmoid,"}, "loss: expected one of"),
        ({"loss": "exo_pair", "label_smoothing": 0.0}, "label_smoothing: loss 'exo_pair' expected 0 < value"),
        ({"label_smoothing": 0.5}, "label_smoothing: expected 0 <= value < 0.5, found 0.5"),
        ({"f_divergence": "tv"}, "f_divergence: expected one of"),
        ({"f_alpha": 0.3}, "f_alpha: expected with f_divergence 'alpha'"),
        ({"loss": "discopop", "discopop_tau": 0.0}, "discopop_tau: expected a positive number"),
        ({"no_such_option": 1.0}, "no_such_option: expected an option of a loss"),
        ({"loss": "ipo"}, "lengths: loss 'ipo' divides by lengths, found None"),
        ({"lengths": torch.ones(4, dtype=torch.int64)}, "lengths: loss 'sigmoid' does not use lengths"),
        ({"loss": "simpo"}, "ref_logps: loss 'simpo' uses no reference"),
        ({"loss": "aot", "pair_weights": torch.ones(1)}, "pair_weights: loss 'aot' sorts the pairs"),
        ({"loss": "aot", "reduction": "none"}, "reduction: loss 'aot' sorts the pairs"),
        ({"loss": "aot", "backend": "triton"}, "backend: loss 'aot' runs on torch"),
        ({"loss": "sigmoid,aot", "wpo": True}, "wpo: loss 'sigmoid,aot' does not use it"),
        ({"ld_alpha": 0.5}, "ld_alpha: needs log-probs per token"),
        ({"wpo": True}, "wpo: needs log-probs per token"),
        ({"ld_reference": False}, "ld_reference: expected with ld_alpha below 1"),
        (
            {"loss": "sigmoid,sft:0.1", "token_reduction": "sum", "ref_logps": torch.zeros(4, requires_grad=True)},
            "no gradient",
        ),
    ],
    ids=str,
)
def test_errors(change, message):
    given = {"policy_logps": torch.zeros(4), "ref_logps": torch.zeros(4), "chosen": torch.tensor([0])}
    with pytest.raises(ValueError, match=message):
        pair_loss(**(given | {"rejected": torch.tensor([1])} | change))


def test_the_readme_has_the_table_of_the_registry():
    from tests.kernels.loss_table import END, README, START, table

    assert README.read_text().split(START)[1].split(END)[0] == table(), "python -m tests.kernels.loss_table writes it"
