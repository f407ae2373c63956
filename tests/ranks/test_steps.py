"""Several processes compute what one does: loss, gradients, clipping, update, metrics and evaluation, in float64."""

from __future__ import annotations

import pytest
import torch

from dpo.precision import RoundedWeights, Weights
from tests.ranks import spawn
from tests.ranks.steps_worker import CASES, run_case
from tests.ranks.updates import ROUNDED, UPDATED, updated

# stock Transformers modules drop to fp32 inside; see tests/train/test_invariance.py
LOGP_BOUND, GRAD_BOUND = 1e-8, 1e-6


def _on(ranks: int, folder):
    path = folder / f"{ranks}.pt"
    for status, _, errors in spawn.run(ranks, "-m", "tests.ranks.steps_worker", str(path), *CASES):
        assert status == 0, errors
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return _on(2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return _on(3, tmp_path_factory.mktemp("three"))


def _agrees(many, name: str) -> None:
    one = run_case(CASES[name])
    assert len(many["routers"]) == len(one["routers"]) == bool(CASES[name].router)
    for ours, theirs in zip(many["routers"], one["routers"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=LOGP_BOUND, atol=LOGP_BOUND)
    for key in ("sums", "second_sums"):
        torch.testing.assert_close(many[key], one[key], rtol=LOGP_BOUND, atol=LOGP_BOUND, msg=key)
    assert many["evaluation"] == pytest.approx(one["evaluation"], rel=LOGP_BOUND, abs=LOGP_BOUND)
    assert many["averaged"] == pytest.approx(one["averaged"], rel=LOGP_BOUND, abs=LOGP_BOUND)
    for key in ("grads", "grad_norm"):
        assert (many[key] - one[key]).norm() <= GRAD_BOUND * one[key].norm(), key
    # 10 clipped to 0.1 by the norm of all ranks, and one step of 1e-2
    assert one["grad_norm"] > 0.1
    if CASES[name].optimizer == "rmsprop":
        assert (many["weights"] - one["weights"]).norm() <= GRAD_BOUND * one["weights"].norm()
    assert (many["tokens"] == one["tokens"]) or CASES[name].plan.layout == "padded"


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_compute_the_step_of_one_process(two, name):
    _agrees(two[name], name)
    assert two[name]["bins"][0] == two[name]["bins"][1]
    assert (sum(two[name]["empty"]) > 0) == ("empty" in name)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.how == "fsdp" and case.cached])
def test_embedding_and_head_are_gathered_and_reduced_once_a_step(two, name):
    assert two[name]["root"] == {"gathers": 1, "reductions": 1}
    if CASES[name].groups > 1:
        assert two[name]["bins"][0] > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_ranks_compute_the_step_of_one_process(three, name):
    _agrees(three[name], name)
    assert len(set(three[name]["bins"])) == 1


@pytest.mark.parametrize("name", ROUNDED)
def test_rounding_at_random_is_the_same_on_any_number_of_ranks(two, name):
    for ours, theirs in zip(two["updates"][0][name], updated(name, RoundedWeights, torch.bfloat16), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", UPDATED)
def test_every_optimizer_updates_what_ranks_hold_parts_of(two, name):
    for ours, theirs in zip(two["updates"][1][name], updated(name, Weights, torch.float64), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
