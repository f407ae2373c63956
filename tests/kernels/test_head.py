"""linear_token_logps: every plan against float64 and each other, shapes, dtypes, autocast, partial gradients."""

from typing import Any

import pytest
import torch
from dpo_kernels import TokenStats, linear_token_logps, plans, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernel_helpers import assert_no_worse, gradient, leaf, lp_allowance, max_error

PLANS = ("frozen", "retain", "recompute")
OPTIONS = [{}, {"softcap": 4.0, "temperature": 0.8, "logit_scale": 0.5}, {"logit_scale": 0.1}]


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles and row chunks at test sizes."""
    monkeypatch.setattr(plans, "TILE_ROWS", 16)
    monkeypatch.setattr(plans, "TILE_ELEMENTS", 16 * 64)


def logps(*arguments, **options) -> Tensor:
    return linear_token_logps(*arguments, **options)


def problem(rows, vocabulary, width, dtype=torch.float32, scale=1.0, ignored=4):
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocabulary, width) * scale / width**0.5).to(dtype)
    targets = torch.randint(vocabulary, (rows,))
    if ignored:
        targets[1::ignored] = -100
    return hidden, weight, (torch.randn(vocabulary) * scale).to(dtype), targets, torch.randn(rows, dtype=torch.float64)


def run(compute, hidden, weight, bias, targets, grad, dtype=None, head_grad=True, **options) -> tuple[Any, ...]:
    """Log-probs and the three gradients (None where not required)."""
    h, w, b = leaf(hidden, dtype), leaf(weight, dtype, grad=head_grad), leaf(bias, dtype, grad=head_grad)
    found = compute(h, w, targets, bias=b, **options)
    found.backward(grad.to(found.dtype))
    return found.detach(), h.grad, w.grad, b.grad


def check(hidden, weight, bias, targets, grad, plan, **options):
    """Error at most eager torch's in the same dtype, plus 2 units for lp and 1e-6 |g| |other factor| for gradients."""
    given = (hidden, weight, bias, targets, grad)
    plan_options = {name: options.pop(name) for name in ("workspace_bytes",) if name in options}
    truth = run(reference.linear_token_logps, *given, dtype=torch.float64, **options)
    eager = run(reference.linear_token_logps, *given, **options)
    ours = run(logps, *given, head_grad=plan != "frozen", plan=plan, **plan_options, **options)
    assert_no_worse(ours[0], eager[0], truth[0], lp_allowance(truth[0]), "lp")
    largest = grad.abs().max().item()
    factors = (weight.abs().sum(1).max().item(), hidden.abs().sum(0).max().item(), float(len(targets)))
    for name, mine, theirs, right, factor in zip(
        ("hidden", "weight", "bias"), ours[1:], eager[1:], truth[1:], factors, strict=True
    ):
        if plan == "frozen" and name != "hidden":
            assert mine is None
            continue
        assert mine.dtype == hidden.dtype
        assert_no_worse(mine, theirs, right, 1e-6 * largest * factor, name)
    return ours


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("rows", "vocabulary", "width"), [(1, 7, 3), (50, 333, 24), (130, 1000, 17)])
def test_float32(rows, vocabulary, width, plan, options, small_tiles):
    check(*problem(rows, vocabulary, width, scale=3.0), plan, **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_float64(plan, options, small_tiles):
    given = problem(50, 333, 24, torch.float64, scale=3.0)
    truth = run(reference.linear_token_logps, *given, **options)
    ours = run(logps, *given, head_grad=plan != "frozen", plan=plan, **options)
    for mine, right in zip(ours, truth, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", PLANS)
def test_half_precision(dtype, plan):
    """Torch's own error here is that of its GEMMs' rounding; ours may not exceed it by more than a quarter."""
    given = problem(60, 2000, 64, dtype, scale=2.0)
    truth = run(reference.linear_token_logps, *given, dtype=torch.float64)
    eager = run(reference.linear_token_logps, *given)
    ours = run(logps, *given, head_grad=plan != "frozen", plan=plan)
    for name, mine, theirs, right in zip(("lp", "hidden", "weight", "bias"), ours, eager, truth, strict=True):
        if mine is not None:
            assert max_error(mine, right) <= 1.25 * max_error(theirs, right), name


@pytest.mark.parametrize("plan", PLANS)
def test_large_vocabulary(plan):
    hidden, weight, bias, targets, grad = problem(5, 151936, 4)
    targets[0] = 151935
    check(hidden, weight, bias, targets, grad, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_logits_up_to_ten_thousand(plan, small_tiles):
    hidden, weight, bias, targets, grad = problem(40, 500, 8, scale=3e3)
    check(hidden, weight, bias * 0, targets, grad, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_confident_rows(plan, small_tiles):
    """The target dominates: 1 - p survives only if the target is subtracted before anything is rounded."""
    hidden, weight, bias, targets, grad = problem(40, 500, 8, scale=3.0, ignored=0)
    hidden = weight[targets] * 30.0
    check(hidden, weight, bias * 0, targets, grad, plan)


@pytest.mark.parametrize("plan", PLANS)
def test_masked_vocabulary(plan, small_tiles):
    """A bias of -inf switches tokens off, whole tiles of them, the first included."""
    hidden, weight, bias, targets, grad = problem(40, 500, 8)
    bias[:200], bias[300:420] = float("-inf"), float("-inf")
    targets = targets.where(targets == -100, 200 + targets % 100)
    given = (hidden, weight, bias, targets, grad)
    truth = run(reference.linear_token_logps, *given, dtype=torch.float64)
    ours = run(logps, *given, head_grad=plan != "frozen", plan=plan)
    for mine, right in zip(ours[:3], truth[:3], strict=True):
        if mine is not None:
            assert mine.isfinite().all()
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_for_every_plan_and_without_gradient(dtype, options, small_tiles):
    hidden, weight, bias, targets, grad = problem(50, 333, 24, dtype)
    given = (hidden, weight, bias, targets, grad)
    runs = [run(logps, *given, head_grad=p != "frozen", plan=p, **options) for p in PLANS]
    runs.append(run(logps, *given, plan="retain", workspace_bytes=20_000, **options))
    with torch.no_grad():
        plain = logps(hidden, weight, targets, bias=bias, **options)
    for found in runs:
        assert torch.equal(found[0], plain)
    # Kept exponentials are rescaled, which rounds; kept raw logits (bf16, soft cap) are what a second GEMM gives.
    same = dtype == torch.bfloat16 or "softcap" in options
    close: dict[str, Any] = {"rtol": 0, "atol": 0} if same else {"rtol": 1e-5, "atol": 2e-6}
    for found in (runs[2], runs[3]):
        for mine, theirs in zip(found[1:], runs[1][1:], strict=True):
            torch.testing.assert_close(mine, theirs, **close)
    again = run(logps, *given, plan="retain", **options)
    assert all(torch.equal(a, b) for a, b in zip(again, runs[1], strict=True))


NEEDED = [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]


@pytest.mark.parametrize("needed", NEEDED)
def test_partial_gradients(needed, small_tiles):
    hidden, weight, bias, targets, grad = problem(50, 333, 24)
    truth = run(reference.linear_token_logps, hidden, weight, bias, targets, grad, dtype=torch.float64)
    leaves = [leaf(part, grad=need) for part, need in zip((hidden, weight, bias), needed, strict=True)]
    found = logps(leaves[0], leaves[1], targets, bias=leaves[2])
    found.backward(grad.float())
    for part, right, need in zip(leaves, truth[1:], needed, strict=True):
        assert (part.grad is not None) == need
        if need:
            torch.testing.assert_close(gradient(part).double(), right, rtol=1e-4, atol=1e-5)


def test_non_contiguous_inputs(small_tiles):
    hidden, weight, bias, targets, grad = problem(50, 333, 24)
    truth = run(reference.linear_token_logps, hidden, weight, bias, targets, grad, dtype=torch.float64)
    h = leaf(hidden.t().contiguous()).t()
    w = leaf(torch.stack([weight, weight], 2))[:, :, 0]
    h.retain_grad()
    w.retain_grad()
    logps(h, w, targets, bias=bias).backward(grad.float())
    torch.testing.assert_close(gradient(h).double(), truth[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(w).double(), truth[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
def test_no_rows_and_no_kept_rows(plan):
    for rows in (0, 5):
        hidden = torch.randn(rows, 4, requires_grad=True)
        weight = torch.randn(30, 4, requires_grad=plan != "frozen")
        found = logps(hidden, weight, torch.full((rows,), -100), plan=plan)
        assert found.tolist() == [0.0] * rows
        found.sum().backward()
        assert gradient(hidden).abs().sum() == 0
        if plan != "frozen":
            assert gradient(weight).abs().sum() == 0


@pytest.mark.parametrize("plan", PLANS)
def test_backward_twice(plan, small_tiles):
    """Retained tiles are used up by the first backward; a second one recomputes them."""
    hidden, weight, _, targets, _ = problem(50, 333, 24)
    h, w = leaf(hidden), leaf(weight, grad=plan != "frozen")
    loss = logps(h, w, targets, plan=plan).sum()
    inputs = [h, w] if w.requires_grad else [h]
    first = torch.autograd.grad(loss, inputs, retain_graph=True)
    second = torch.autograd.grad(loss, inputs)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_autocast(plan, hidden_dtype, small_tiles):
    """GEMMs in bf16, dW back in fp32: no further from float64 than torch's own autocast."""
    hidden, weight, bias, targets, grad = problem(60, 500, 32, scale=2.0)
    hidden = hidden.to(torch.bfloat16).to(hidden_dtype)
    weight = weight.bfloat16().float()
    truth = run(reference.linear_token_logps, hidden, weight, bias, targets, grad, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        eager = run(reference.linear_token_logps, hidden, weight, bias, targets, grad)
        ours = run(logps, hidden, weight, bias, targets, grad, head_grad=plan != "frozen", plan=plan)
        with torch.no_grad():
            assert torch.equal(logps(hidden, weight, targets, bias=bias), ours[0])
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == hidden_dtype
    for name, mine, theirs, right in zip(("lp", "hidden", "weight", "bias"), ours, eager, truth, strict=True):
        if mine is not None:
            assert max_error(mine, right) <= 1.5 * max_error(theirs, right), name
    assert ours[2] is None or ours[2].dtype == torch.float32


def test_autocast_leaves_float64_alone():
    given = problem(10, 50, 8, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(logps, *given)
    torch.testing.assert_close(found[0], run(reference.linear_token_logps, *given)[0])


@pytest.mark.parametrize("options", OPTIONS)
def test_statistics(options, small_tiles):
    hidden, weight, bias, targets, _ = problem(50, 333, 24, scale=3.0)
    names = ("entropy", "max_is_target", "mean_logit", "log_sum_sq")
    found = linear_token_logps(hidden, weight, targets, bias=bias, stats=names, **options)
    assert isinstance(found, TokenStats)
    assert found.max_is_target is not None
    wide = hidden.double() @ weight.double().T + bias.double()
    truth = reference.token_stats(wide, targets, **options)
    for name in ("entropy", "mean_logit", "log_sum_sq"):
        torch.testing.assert_close(getattr(found, name).double(), truth[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(found.max_is_target, truth["max_is_target"])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    vocabulary=st.integers(1, 90),
    width=st.integers(1, 9),
    plan=st.sampled_from(PLANS),
    workspace=st.sampled_from([None, 0, 3000]),
    tiles=st.tuples(st.integers(1, 20), st.integers(1, 600)),
    seed=st.integers(0, 2**20),
)
def test_any_shape_tiling_and_mask(rows, vocabulary, width, plan, workspace, tiles, seed):
    torch.manual_seed(seed)
    given = problem(rows, vocabulary, width, torch.float64, ignored=1 + seed % 4)
    truth = run(reference.linear_token_logps, *given)
    if plan == "frozen":
        workspace = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "TILE_ROWS", tiles[0])
        patch.setattr(plans, "TILE_ELEMENTS", tiles[1])
        ours = run(logps, *given, head_grad=plan != "frozen", plan=plan, workspace_bytes=workspace)
    for mine, right in zip(ours, truth, strict=True):
        if mine is not None:
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden: expected shape \[N, H\]"),
        ({"hidden": torch.zeros(2, 4, dtype=torch.int64)}, "hidden: expected a floating-point tensor"),
        ({"weight": torch.zeros(5, 3)}, r"weight: expected shape \[5, 4\]"),
        ({"bias": torch.zeros(4)}, "bias: expected shape"),
        ({"targets": torch.tensor([0, 5])}, "targets: expected entries in"),
        ({"targets": torch.tensor([0])}, "targets: expected shape"),
        ({"plan": "fast"}, "plan: expected one of"),
        ({"workspace_bytes": -1}, "workspace_bytes: expected"),
        ({"plan": "frozen", "weight": torch.zeros(5, 4, requires_grad=True)}, "plan: 'frozen' needs"),
        (
            {"plan": "frozen", "workspace_bytes": 8, "hidden": torch.zeros(2, 4, requires_grad=True)},
            "workspace_bytes: plan",
        ),
        ({"backend": "nope"}, "backend: expected one of"),
    ],
)
def test_errors(change, message):
    given: dict[str, Any] = {"hidden": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "targets": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match=message):
        linear_token_logps(**(given | change))
