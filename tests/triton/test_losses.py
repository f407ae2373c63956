"""Every loss in the kernels against the plain formulas in float64: values, rewards, gradients, hard values."""

from typing import Any

import pytest
import torch
from dpo_kernels import LOSSES, PairCall, dpo_loss_from_logits, pair_loss, reference
from dpo_kernels.losses import KERNEL_IDS
from dpo_kernels.tri import KernelCall, fixed
from dpo_kernels.tri.pairs import pair_forward

from tests.harness.order import program_order
from tests.harness.traffic import count_traffic
from tests.kernel_helpers import gradient, leaf
from tests.loss_cases import CASES, label, problem

pytestmark = pytest.mark.usefixtures("interpreted")
IN_KERNEL = [case for case in CASES if all(part.split(":")[0] in KERNEL_IDS for part in case[0].split(","))]


@pytest.mark.parametrize("case", IN_KERNEL, ids=label)
def test_pair_kernel(case):
    loss, options = case
    given = problem()
    arguments = given.arguments(loss, options)
    policy, ref = given.policy.float(), arguments.pop("ref_logps")
    ref, lengths = None if ref is None else ref.float(), arguments.pop("lengths")
    call = KernelCall.of(PairCall.check(loss, 0.3, "sum", **options))
    truth = leaf(policy, torch.float64)
    work = torch.zeros(fixed.workspace_size(8), dtype=torch.int64)
    with count_traffic() as traffic:
        found = pair_forward(policy, ref, given.chosen, given.rejected, None, call, lengths=lengths, work=work)
    assert sum(traffic.launches.values()) == 1
    assert not work.any()
    wide = None if ref is None else ref.double()
    settings: dict[str, Any] = {"loss": loss, "beta": 0.3, "lengths": lengths, **options}
    losses, won, lost = reference.pair_loss(truth, wide, given.chosen, given.rejected, reduction="none", **settings)
    losses.sum().backward()
    # margins are rounded to fp32: 2e-7 of a loss of size one, relative beyond it
    torch.testing.assert_close(found.losses.double(), losses.detach(), rtol=1e-6, atol=5e-7)
    torch.testing.assert_close(found.grad.double(), gradient(truth), rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(found.rewards.double(), torch.stack([won, lost]), rtol=1e-6, atol=1e-12)


def batch(loss: str, options: dict[str, Any], reference_per: str) -> tuple[Any, ...]:
    """Logits and all else that `dpo_loss_from_logits` takes; log-probs of a token near -0.5."""
    maker = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 11, (36,), generator=maker)
    targets[::7] = -100
    logits = torch.randn(36, 11, generator=maker)
    logits[torch.arange(36), targets.clamp(min=0)] += 3.0
    ids = torch.randint(-1, 6, (36,), generator=maker)
    ref = {"token": -torch.rand(36, generator=maker), "completion": -9 * torch.rand(6, generator=maker), "none": None}
    index = torch.randint(0, 6, (2, 9), generator=maker)
    base = ref[reference_per] if PairCall.check(loss, 0.1, "mean", **options).reference else None
    return logits, targets, ids, base, index[0], index[1]


@pytest.mark.parametrize("reference_per", ["token", "completion", "none"])
@pytest.mark.parametrize(
    "case",
    [
        *(("ipo", {}), ("simpo", {"gamma": 0.3}), ("orpo", {}), ("sigmoid:1,sft:0.5", {}), ("bco_pair", {})),
        ("sigmoid_norm:1,unlikelihood:0.3", {"f_divergence": "js"}),
    ],
    ids=label,
)
def test_from_logits_in_one_launch(case, reference_per):
    """Lengths are counted, and log-probs summed beside log ratios, by the rows' own programs."""
    loss, options = case
    logits, *rest = batch(loss, options, reference_per)
    settings: dict[str, Any] = {"loss": loss, "beta": 0.4, "num_completions": 6, **options}
    ours, theirs = leaf(logits), leaf(logits, torch.float64)
    with count_traffic() as traffic:
        found = dpo_loss_from_logits(ours, *rest, **settings, backend="triton")
    assert traffic.launches["fused_forward_kernel"] == 1
    assert sum(traffic.launches.values()) - traffic.launches.get("round_kernel", 0) == 1
    rest[2] = None if rest[2] is None else rest[2].double()
    truth = dpo_loss_from_logits(theirs, *rest, **settings, backend="torch")
    found.loss.backward()
    truth.loss.backward()
    assert found.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient(ours).double(), gradient(theirs), rtol=1e-5, atol=2e-7)
    torch.testing.assert_close(found.chosen_rewards.double(), truth.chosen_rewards, rtol=1e-6, atol=1e-6)


def test_any_program_order_is_bitwise_equal_and_leaves_a_clean_workspace(monkeypatch):
    held = []
    monkeypatch.setattr(fixed, "workspace", lambda device, c: held[0] if held else held.append(_work(c)) or held[0])
    loss = "sigmoid_norm:1,sft:0.5"
    arguments = batch(loss, {}, "token")
    results = []
    for seed in range(3):
        with program_order(seed):
            x = leaf(arguments[0])
            found = dpo_loss_from_logits(x, *arguments[1:], loss=loss, num_completions=6, backend="triton")
            found.loss.backward()
        assert not held[0].any()
        results.append((found.loss.detach(), gradient(x)))
    assert all(torch.equal(a, b) for first in results for a, b in zip(first, results[0], strict=True))


def _work(completions: int) -> torch.Tensor:
    return torch.zeros(fixed.workspace_size(completions), dtype=torch.int64)


@pytest.mark.parametrize("loss", KERNEL_IDS)
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_hard_values(loss, size):
    """Log ratios far apart, both ways: what float64 says, as far as fp32 reaches."""
    policy, ref = torch.tensor([-size - 1.0, -1.0]), torch.tensor([-1.0, -size - 1.0])
    call = PairCall.check(loss, 0.1, "sum", **({"alphapo_alpha": 0.01} if loss == "alphapo" else {}))
    settings: dict[str, Any] = {"loss": loss, "lengths": torch.tensor([9, 5]) if call.lengths else None}
    settings |= {"alphapo_alpha": 0.01} if loss == "alphapo" else {}
    index = torch.tensor([0, 1]), torch.tensor([1, 0])
    ours, theirs = leaf(policy), leaf(policy, torch.float64)
    found = pair_loss(ours, ref if call.reference else None, *index, backend="triton", reduction="sum", **settings)
    truth = pair_loss(theirs, ref.double() if call.reference else None, *index, reduction="sum", **settings)
    found.loss.backward()
    truth.loss.backward()
    assert found.loss.item() == pytest.approx(truth.loss.item(), rel=2e-6, abs=1e-6)
    torch.testing.assert_close(gradient(ours).double(), gradient(theirs), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.4}, {"wpo": True}, {"loss": "aot"}], ids=str)
def test_what_is_not_in_the_kernel_still_takes_its_log_probs_from_one(options):
    logits, *rest = batch("sigmoid", {}, "token")
    ours, theirs = leaf(logits), leaf(logits, torch.float64)
    with count_traffic() as traffic:
        found = dpo_loss_from_logits(ours, *rest, num_completions=6, backend="triton", **options)
    assert traffic.launches["logps_forward_kernel"] == 1
    rest[2] = rest[2].double()
    truth = dpo_loss_from_logits(theirs, *rest, num_completions=6, **options)
    found.loss.backward()
    truth.loss.backward()
    assert found.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    torch.testing.assert_close(gradient(ours).double(), gradient(theirs), rtol=1e-5, atol=2e-7)


def test_every_loss_is_tried():
    assert {part.split(":")[0] for loss, _ in IN_KERNEL for part in loss.split(",")} == set(KERNEL_IDS)
    assert len(LOSSES) == len(KERNEL_IDS) + 2


def test_a_saturated_loss_stays_flat():
    """Where f' overflows the margin is settled and the gradient 0, not NaN."""
    policy = leaf(torch.tensor([-1.0, -2001.0]))
    index = torch.tensor([0]), torch.tensor([1])
    found = pair_loss(policy, torch.zeros(2), *index, f_divergence="forward_kl", backend="triton")
    found.loss.backward()
    assert found.loss.item() == 0.0
    assert gradient(policy).tolist() == [0.0, 0.0]
