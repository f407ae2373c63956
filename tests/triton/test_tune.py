"""Launch parameters by measurement: off unless asked for, one tuning a key, right results under every candidate."""

import pytest
import torch
from dpo_kernels import linear_token_logps, reference, token_logps
from dpo_kernels.tri import rows, tune

from tests.harness.interpret import interpret


@pytest.fixture
def trials(monkeypatch):
    """Trials are recorded, not run; the last candidate wins."""
    seen = []
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "SCRATCH_BYTES", 1 << 12)

    def seconds(work):
        seen.append(tune._trial)
        return -float(len(seen))

    monkeypatch.setattr(tune, "seconds", seconds)
    return seen


def both_ways(vocabulary=600):
    logits = torch.randn(5, vocabulary, requires_grad=True)
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    targets = torch.randint(0, vocabulary, (5,))
    with interpret():
        found = token_logps(logits, targets, backend="triton")
        head = linear_token_logps(hidden, weight, targets, backend="triton")
        (found.sum() + head.sum()).backward()
    wide = logits.detach().double().requires_grad_()
    truth = reference.token_logps(wide, targets)
    truth.sum().backward()
    assert logits.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(logits.grad.double(), wide.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        head.double(), reference.linear_token_logps(hidden.double(), weight.double(), targets), rtol=1e-5, atol=1e-5
    )


def test_off_by_default(trials, monkeypatch):
    monkeypatch.delenv("DPO_KERNELS_AUTOTUNE", raising=False)
    both_ways()
    assert not trials


def test_one_tuning_a_kernel_and_its_choice_is_used(trials, monkeypatch):
    monkeypatch.setenv("DPO_KERNELS_AUTOTUNE", "1")
    both_ways()
    names = {key[0] for key in tune._chosen}
    assert names == {"forward", "backward", "fold", "gradient"}
    rule = rows.launch_for(torch.float32, 600, torch.device("cpu"))
    assert all(launch != rule for launch in tune._chosen.values())
    before = len(trials)
    both_ways()
    assert len(trials) == before


def test_a_trial_launches_its_candidate(monkeypatch):
    """The whole tuning, its clock apart, under the interpreter."""
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "SCRATCH_BYTES", 1 << 12)
    monkeypatch.setattr(tune, "seconds", lambda work: (work(), 1.0)[1])
    monkeypatch.setenv("DPO_KERNELS_AUTOTUNE", "1")
    both_ways(80)
    rule = rows.launch_for(torch.float32, 80, torch.device("cpu"))
    assert set(tune._chosen.values()) == {rule}  # all as fast: the rule stays


@pytest.mark.parametrize("vocabulary", [7, 1000, 32000, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_candidates(vocabulary, dtype):
    rule = rows.launch_for(dtype, vocabulary, torch.device("cpu"))
    found = tune.candidates(rule)
    assert found[0] == rule
    assert len(set(found)) == len(found) <= 6
    assert all(launch.lanes == 32 * launch.warps and launch.lanes <= 512 for launch in found)
