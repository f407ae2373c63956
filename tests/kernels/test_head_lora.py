"""LoRA factors of the LM head: value and every gradient against float64, in each plan and precision."""

from typing import Any

import pytest
import torch
from dpo_kernels import LinearDPOLoss, LoraFactors, choose_plan, linear_dpo_loss, linear_token_logps, plans, reference
from torch import Tensor

from tests.kernel_helpers import leaf, max_error

SCALING = 1.7
NAMES = ("lp", "hidden", "weight", "bias", "a", "b")
FROZEN_HEAD = (True, False, False, True, True)
"""What requires a gradient where an adapter is trained: hidden, weight, bias, a, b."""


@pytest.fixture(params=[(16, 16 * 64), (7, 7 * 50)], ids=["even tiles", "odd tiles"])
def small_tiles(request, monkeypatch):
    monkeypatch.setattr(plans, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(plans, "TILE_ELEMENTS", request.param[1])


def problem(rows=41, vocabulary=333, width=24, rank=5, dtype=torch.float64) -> list[Tensor]:
    """hidden, weight, bias, a, b, targets, upstream gradient."""
    a, b = torch.randn(rank, width) / width**0.5, torch.randn(vocabulary, rank)
    targets = torch.randint(vocabulary, (rows,))
    targets[1::4] = -100
    weight = torch.randn(vocabulary, width) / width**0.5
    floats = torch.randn(rows, width), weight, torch.randn(vocabulary), a, b
    return [*(part.to(dtype) for part in floats), targets, torch.randn(rows, dtype=torch.float64)]


def run(compute, given, needed=(True,) * 5, dtype=None, **options) -> list[Any]:
    """Log-probs and five gradients (None where not required)."""
    *floats, targets, grad = given
    parts = [leaf(part, dtype, grad=need) for part, need in zip(floats, needed, strict=True)]
    hidden, weight, bias, a, b = parts
    found = compute(hidden, weight, targets, bias=bias, lora=LoraFactors(a, b, SCALING), **options)
    found.backward(grad.to(found.dtype))
    return [found.detach(), *(part.grad for part in parts)]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("options", [{}, {"softcap": 4.0, "temperature": 0.8, "logit_scale": 0.5}], ids=str)
@pytest.mark.parametrize(
    ("plan", "needed"),
    [
        ("retain", (True,) * 5),
        ("recompute", (True,) * 5),
        ("retain", FROZEN_HEAD),
        ("recompute", FROZEN_HEAD),
        ("retain", (False, False, False, False, True)),
        ("frozen", (True, False, False, True, False)),
        ("frozen", (False, False, False, True, False)),
        ("frozen", (True, False, False, False, False)),
    ],
)
def test_float64(plan, needed, options):
    given = problem()
    truth = run(reference.linear_token_logps, given, needed, **options)
    ours = run(linear_token_logps, given, needed, plan=plan, **options)
    for name, mine, right in zip(NAMES, ours, truth, strict=True):
        assert (mine is None) == (right is None), name
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("plan", ["frozen", "retain", "recompute"])
def test_float32_against_eager(plan):
    """No further from float64 than eager torch, plus 1e-6 of what is summed."""
    needed = (True, False, False, True, plan != "frozen")
    given = problem(dtype=torch.float32)
    truth = run(reference.linear_token_logps, given, needed, dtype=torch.float64)
    eager = run(reference.linear_token_logps, given, needed)
    ours = run(linear_token_logps, given, needed, plan=plan)
    for name, mine, theirs, right in zip(NAMES, ours, eager, truth, strict=True):
        if mine is not None:
            allowed = max_error(theirs, right) + 1e-6 * right.abs().max().item()
            assert max_error(mine, right) <= allowed, name


@pytest.mark.parametrize("plan", ["frozen", "retain", "recompute"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_head_with_fp32_factors(plan, autocast):
    """As adapters on a bf16 base are held: no further from float64 than torch's own, gradients in each one's dtype."""
    needed = (True, False, False, True, plan != "frozen")
    *floats, targets, grad = problem(60, 700, 64)
    hidden, weight, bias = (part.bfloat16() for part in floats[:3])
    # Entries that bf16 holds: both sides round them on the way in.
    a, b = (part.bfloat16().float() for part in floats[3:])
    if autocast:
        weight = weight.float()
    given = [hidden, weight, bias, a, b, targets, grad]
    truth = run(reference.linear_token_logps, given, needed, dtype=torch.float64)
    halves = [hidden, weight.bfloat16(), bias, a.bfloat16(), b.bfloat16(), targets, grad]
    eager = run(reference.linear_token_logps, halves, needed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = run(linear_token_logps, given, needed, plan=plan)
    for name, mine, theirs, right in zip(NAMES, ours, eager, truth, strict=True):
        if mine is not None:
            assert max_error(mine, right) <= 1.25 * max_error(theirs, right), name
    assert ours[0].dtype == torch.float32
    assert ours[4].dtype == torch.float32


@pytest.mark.usefixtures("small_tiles")
def test_same_bits_for_every_plan_and_without_gradient():
    for dtype in (torch.float32, torch.bfloat16):
        given = problem(dtype=dtype)
        frozen = run(linear_token_logps, given, (True, False, False, False, False), plan="frozen")
        for plan, budget in (("retain", None), ("retain", 9000), ("recompute", None)):
            assert torch.equal(run(linear_token_logps, given, plan=plan, workspace_bytes=budget)[0], frozen[0])
        hidden, weight, bias, a, b, targets, _ = given
        scored = linear_token_logps(hidden, weight, targets, bias=bias, lora=(a, b, SCALING))
        assert torch.equal(scored, frozen[0])


def test_factors_of_zero_change_no_bit():
    """Where b is 0, as adapters begin, the log-probs are those of the head alone: margins of step 0 are exactly 0."""
    hidden, weight, bias, a, b, targets, _ = problem(dtype=torch.float32)
    plain = linear_token_logps(hidden, weight, targets, bias=bias)
    assert torch.equal(linear_token_logps(hidden, weight, targets, bias=bias, lora=(a, b * 0, 2.0)), plain)


def test_statistics_and_no_rows():
    hidden, weight, bias, a, b, targets, _ = problem()
    merged = weight + SCALING * b @ a
    names = ("entropy", "max_is_target", "mean_logit", "log_sum_sq")
    found = linear_token_logps(hidden, weight, targets, bias=bias, lora=(a, b, SCALING), stats=names)
    expected = linear_token_logps(hidden, merged, targets, bias=bias, stats=names)
    torch.testing.assert_close(found, expected)
    empty = linear_token_logps(hidden[:0], weight, targets[:0], lora=(a.requires_grad_(), b, SCALING))
    empty.sum().backward()
    assert a.grad is not None
    assert not a.grad.any()


def test_losses_take_factors():
    hidden, weight, _, a, b, targets, _ = problem(rows=12)
    ids, index = torch.arange(12) % 4, (torch.tensor([0, 2]), torch.tensor([1, 3]))
    targets = targets.clamp(min=0)
    gradients = []
    for merge in (False, True):
        leaves = [leaf(part) for part in (hidden, a, b)]
        h, a1, b1 = leaves
        head = weight + SCALING * b1 @ a1 if merge else weight
        lora = None if merge else LoraFactors(a1, b1, SCALING)
        found = linear_dpo_loss(h, head, targets, ids, None, *index, num_completions=4, lora=lora)
        found.loss.backward()
        gradients.append([part.grad for part in leaves])
        packed = {"completion_ids": ids, "chosen": index[0], "rejected": index[1], "num_completions": 4}
        assert torch.equal(LinearDPOLoss()(h, head, targets, lora=lora, **packed).loss, found.loss)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_the_plan_knows_the_factors():
    size = (512, 32000, 512, torch.float32)
    assert choose_plan(*size, False, lora_rank=16).name == "frozen"
    trained = choose_plan(*size, False, lora_rank=16, lora_requires_grad=True)
    assert trained.name == "retain"
    assert trained.gemms == pytest.approx(2 + 3 / 32)
    again = choose_plan(*size, False, 0, lora_rank=16, lora_requires_grad=True)
    assert again.gemms == pytest.approx(3 + 4 / 32)
    with pytest.raises(ValueError, match="found LoRA factor b that requires grad"):
        choose_plan(*size, False, plan="frozen", lora_rank=16, lora_requires_grad=True)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ((torch.zeros(2, 4), torch.zeros(5, 3), 1.0), r"lora.b: expected shape \[5, 2\]"),
        ((torch.zeros(2, 3), torch.zeros(5, 2), 1.0), r"lora.a: expected shape \[2, 4\]"),
        ((torch.zeros(4), torch.zeros(5, 2), 1.0), r"lora.a: expected shape \[r, H\]"),
        ((torch.zeros(2, 4, dtype=torch.int64), torch.zeros(5, 2), 1.0), "lora.a: expected a floating-point"),
    ],
)
def test_errors(lora, message):
    with pytest.raises(ValueError, match=message):
        linear_token_logps(torch.zeros(2, 4), torch.zeros(5, 4), torch.tensor([0, 1]), lora=lora)
