"""token_pair_loss and what runs on it: log-probs per token against plain formulas and autograd, LD-DPO, WPO, sums."""

from typing import Any

import pytest
import torch
from dpo_kernels import LOSSES, DPOLoss, dpo_loss_from_logits, linear_dpo_loss, reference, token_logps, token_pair_loss
from dpo_kernels.reference_losses import Completions, sum_of_losses
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_helpers import gradient, leaf
from tests.loss_cases import CASES, label

INDEX = torch.tensor([0, 2, 0, 4]), torch.tensor([1, 3, 3, 1])


def rows(seed: int = 0, completions: int = 5, count: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of policy and reference, and completions in any order, -1 for none."""
    maker = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, completions, (count,), generator=maker)
    logps = -torch.rand(count, generator=maker, dtype=torch.float64) - 0.05
    return logps, logps + torch.randn(count, generator=maker, dtype=torch.float64), ids


def plain_loss(
    logps: Tensor, ref: Tensor | None, ids: Tensor, index: tuple[Tensor, Tensor], loss: str, **options: Any
) -> Tensor:
    """Pair by pair, each completion's tokens picked out and weighted by hand; the mean."""
    alpha, both = options.pop("ld_alpha", 1.0), options.pop("ld_reference", True)
    squares, sides = options.pop("log_sum_sq", None), ([], [])
    weights = []
    for pair in zip(*(part.tolist() for part in index), strict=True):
        tokens = [logps[ids == c] for c in pair]
        refs = [None if ref is None else ref[ids == c] for c in pair]
        shared = min(len(t) for t in tokens)
        exponent = 0.0
        for k, (c, t, r) in enumerate(zip(pair, tokens, refs, strict=True)):
            w = torch.ones_like(t).where(torch.arange(len(t)) < shared, alpha)
            base = torch.zeros_like(t) if r is None else r
            sides[k].append(torch.stack([(w * t).sum(), ((w if both else 1.0) * base).sum(), torch.tensor(len(t))]))
            if squares is not None:
                exponent = exponent + (t - squares[ids == c]).mean()
        weights.append(torch.as_tensor(exponent).detach().exp())
    won, lost = (Completions(*torch.stack(side).T) for side in sides)
    return (sum_of_losses(loss, won, lost, 0.2, options) * torch.stack(weights)).mean()


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_loss_from_tokens(case):
    loss, options = case
    logps, ref, ids = rows()
    parts = loss.split(",")
    uses_ref = any(LOSSES[part.split(":")[0]].reference for part in parts)
    ours, theirs = leaf(logps), leaf(logps)
    base = ref if uses_ref else None
    found = token_pair_loss(ours, base, ids, *INDEX, loss=loss, beta=0.2, **options)
    truth = plain_loss(theirs, base, ids, INDEX, loss, **options)
    found.loss.backward()
    truth.backward()
    torch.testing.assert_close(found.loss, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-10, atol=1e-13)
    if uses_ref:
        summed = token_pair_loss(
            logps, reference.completion_sums(ref, ids, 5), ids, *INDEX, loss=loss, beta=0.2, **options
        )
        torch.testing.assert_close(summed.loss, truth.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss", [name for name, entry in LOSSES.items() if "ld_alpha" in entry.options])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
@pytest.mark.parametrize("both", [True, False])
def test_ld_dpo(loss, alpha, both):
    """A completion in several pairs has another shared part in each."""
    logps, ref, ids = rows(1)
    options: dict[str, Any] = {"ld_alpha": alpha, "ld_reference": both}
    ours, theirs = leaf(logps), leaf(logps)
    found = token_pair_loss(ours, ref, ids, *INDEX, loss=loss, beta=0.2, **options)
    truth = plain_loss(theirs, ref, ids, INDEX, loss, **options)
    found.loss.backward()
    truth.backward()
    torch.testing.assert_close(found.loss, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-9, atol=1e-13)


def test_ld_dpo_leaves_other_terms_alone():
    """The likelihood term of a sum sees every token in full."""
    logps, ref, ids = rows(2)
    found = token_pair_loss(logps, ref, ids, *INDEX, loss="sigmoid:1,sft:0.3", ld_alpha=0.2)
    alone = token_pair_loss(logps, ref, ids, *INDEX, ld_alpha=0.2).loss
    likelihood = token_pair_loss(logps, None, ids, *INDEX, loss="sft").loss
    torch.testing.assert_close(found.loss, alone + 0.3 * likelihood)


def test_ld_dpo_masks_the_tail_exactly_at_zero_and_equal_models_have_no_reward():
    logps, _, ids = rows(3)
    ids = ids.sort().values
    index = torch.tensor([0]), torch.tensor([1])
    ours = leaf(logps)
    found = token_pair_loss(ours, logps, ids, *index, ld_alpha=0.0)
    found.loss.backward()
    counts = [(ids == c).sum().item() for c in (0, 1)]
    longer = counts.index(max(counts))
    tail = (ids == longer).nonzero()[min(counts) :]
    assert len(tail)
    assert not gradient(ours)[tail].any()
    assert not found.chosen_rewards.any()
    assert not found.rejected_rewards.any()


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo", "sft", "sigmoid:1,sft:0.2"])
def test_wpo(loss):
    """Eq. 2 of the paper: pairs weigh as their completions' probability a token over its expectation."""
    logits = torch.randn(40, 17, dtype=torch.float64) * 2
    targets = torch.randint(17, (40,))
    _, _, ids = rows(4)
    squares = (2 * logits.log_softmax(-1)).logsumexp(-1)
    ref = torch.randn(40, dtype=torch.float64) - 3
    base = None if loss in ("simpo", "sft") else ref
    ours, theirs = leaf(logits), leaf(logits)
    found = dpo_loss_from_logits(ours, targets, ids, base, *INDEX, loss=loss, beta=0.2, wpo=True)
    truth = plain_loss(reference.token_logps(theirs, targets), base, ids, INDEX, loss, log_sum_sq=squares)
    found.loss.backward()
    truth.backward()
    torch.testing.assert_close(found.loss, truth, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-10, atol=1e-13)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    loss=st.sampled_from(["sigmoid", "ipo", "aot", "bco_pair", "sigmoid:1,hinge:0.4"]),
    alpha=st.floats(0.0, 0.99),
)
def test_any_rows(seed, loss, alpha):
    logps, ref, ids = rows(seed, count=25)
    ids = torch.cat([torch.arange(5), ids])  # a mean over no tokens is not defined by hand
    logps, ref = torch.cat([logps[:5], logps]), torch.cat([ref[:5], ref])
    ours, theirs = leaf(logps), leaf(logps)
    token_pair_loss(ours, ref, ids, *INDEX, loss=loss, beta=0.2, ld_alpha=alpha).loss.backward()
    plain_loss(theirs, ref, ids, INDEX, loss, ld_alpha=alpha).backward()
    torch.testing.assert_close(gradient(ours), gradient(theirs), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "case", [("ipo", {}), ("simpo", {}), ("sigmoid:1,sft:0.1", {}), ("sigmoid", {"ld_alpha": 0.3})], ids=label
)
def test_from_hidden_states_and_logits_alike(case):
    """linear_dpo_loss, dpo_loss_from_logits and the module against log-probs apart; ignored rows have no length."""
    loss, options = case
    hidden, weight = torch.randn(12, 6, dtype=torch.float64), torch.randn(19, 6, dtype=torch.float64)
    targets = torch.randint(19, (4, 3))
    targets[1, 2] = targets[3, 0] = -100
    index = torch.tensor([0, 1]), torch.tensor([2, 3])
    ids = torch.arange(4).repeat_interleave(3)
    ref = None if loss == "simpo" else torch.randn(12, dtype=torch.float64)
    logits = (hidden @ weight.T).view(4, 3, 19)
    lp = token_logps(logits, targets)
    truth = token_pair_loss(
        lp.view(-1), ref, ids.where(targets.view(-1) != -100, -1), *index, loss=loss, **options
    ).loss
    flat = targets.view(-1), ids, ref, *index
    assert torch.equal(linear_dpo_loss(hidden, weight, *flat, loss=loss, **options).loss, truth)
    torch.testing.assert_close(dpo_loss_from_logits(logits.view(12, 19), *flat, loss=loss, **options).loss, truth)
    module = DPOLoss(loss=loss, **options)
    torch.testing.assert_close(module(logits, targets, None if ref is None else ref.view(4, 3)).loss, truth)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wpo": True}, "log_sum_sq: expected one a row"),
        ({"log_sum_sq": torch.zeros(3)}, "log_sum_sq: expected None"),
        ({"ld_alpha": 0.5, "ref_logps": torch.zeros(2)}, "ref_logps: ld_alpha needs one a row"),
        ({"loss": "simpo", "ld_alpha": 0.5, "ref_logps": None}, "ld_alpha: loss 'simpo' does not use it"),
        ({"loss": "orpo"}, "ref_logps: loss 'orpo' uses no reference"),
        ({"loss": "aot", "pair_weights": torch.ones(1)}, "pair_weights: loss 'aot'"),
        ({"token_logps": torch.zeros(3, 1)}, "token_logps: expected shape"),
    ],
    ids=str,
)
def test_errors(change, message):
    given = {"token_logps": torch.zeros(3), "ref_logps": torch.zeros(3), "completion_ids": torch.tensor([0, 0, 1])}
    given |= {"chosen": torch.tensor([0]), "rejected": torch.tensor([1])}
    with pytest.raises(ValueError, match=message):
        token_pair_loss(**(given | change))
