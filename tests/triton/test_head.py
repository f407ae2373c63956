"""The LM head on the Triton backend: every plan against float64, tiles of every shape, and what the folds move."""

from typing import Any

import pytest
import torch
from dpo_kernels import linear_dpo_loss, linear_token_logps, plans, reference
from dpo_kernels.common import LogitOptions
from dpo_kernels.tri.tiles import TileState, fold_tile, tile_gradient

from tests.harness.hints import check_hints
from tests.harness.order import program_order
from tests.harness.traffic import count_traffic

pytestmark = pytest.mark.usefixtures("interpreted")
SMALL = (4, 4 * 64)
IGNORE = -100


@pytest.fixture(params=[SMALL, (5, 5 * 99)], ids=["even tiles", "odd tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", request.param)


def make(n=9, hidden=24, vocabulary=149, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(n, hidden, generator=generator).to(dtype)
    w = (torch.randn(vocabulary, hidden, generator=generator) * 0.7).to(dtype)
    b = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    targets = torch.randint(0, vocabulary, (n,), generator=generator)
    targets[3] = targets[8] = IGNORE
    return h, w, b, targets, torch.randn(n, generator=generator)


def leaves(*tensors, dtype=None) -> list[Any]:
    return [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors]


def ours(h, w, b, targets, upstream, **options):
    h, w, b = leaves(h, w, b)
    if options.get("plan") == "frozen":
        w.requires_grad_(False)
    logps = linear_token_logps(h, w, targets, bias=b, backend="triton", **options)
    logps.backward(upstream)
    return logps.detach(), h.grad, w.grad, None if b is None else b.grad


def truth(h, w, b, targets, upstream, **options):
    for name in ("plan", "workspace_bytes"):
        options.pop(name, None)
    h, w, b = leaves(h, w, b, dtype=torch.float64)
    logps = reference.linear_token_logps(h, w, targets, bias=b, **options)
    logps.backward(upstream.double())
    return logps.detach(), h.grad, w.grad, None if b is None else b.grad


def assert_close(found, expected, tolerance):
    """Error relative to the largest entry of each."""
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            assert (a.double() - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("plan", ["frozen", "retain", "recompute"])
def test_plans_against_float64(plan):
    arguments = make()
    with check_hints():
        found = ours(*arguments, plan=plan)
    assert_close(found, truth(*arguments), 2e-6)


@pytest.mark.slow
def test_one_tile_of_many_rows():
    arguments = make(n=200, vocabulary=1003)
    assert_close(ours(*arguments, plan="retain"), truth(*arguments), 2e-6)


@pytest.mark.parametrize("plan", ["frozen", "retain", "recompute"])
@pytest.mark.parametrize("options", [{"softcap": 5.0, "temperature": 0.7}, {"logit_scale": -0.5}], ids=str)
def test_scaling(plan, options, monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", SMALL)
    arguments = make()
    with check_hints():
        found = ours(*arguments, plan=plan, **options)
    assert_close(found, truth(*arguments, **options), 2e-6)


@pytest.mark.usefixtures("tiles")
def test_bias():
    arguments = make(bias=True)
    assert_close(ours(*arguments, plan="recompute"), truth(*arguments), 2e-6)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("plan", ["frozen", "retain", "recompute"])
def test_bf16_rounds_only_gradient_tiles(plan):
    """Log-probs are as exact as from fp32 GEMMs of the same bf16 inputs; gradients carry one rounding of each tile."""
    arguments = make(dtype=torch.bfloat16)
    found, expected = ours(*arguments, plan=plan), truth(*arguments)
    assert_close(found[:1], expected[:1], 2e-6)
    assert_close(found[1:], expected[1:], 2.0**-7)
    assert found[1].dtype == torch.bfloat16


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("plan", ["frozen", "retain", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_factors(plan, dtype):
    """Value, gradients of rows, both factors and (not frozen) the weight; bf16 rounds the rows' low rank too."""
    h, w, _, targets, upstream = make(dtype=dtype)
    a, b = torch.randn(3, 24).to(dtype), torch.randn(149, 3).to(dtype) * 0.2
    found = []
    for wide in (None, torch.float64):
        leaves_ = leaves(h, w, a, b, dtype=wide)
        for index in (1, 3) if plan == "frozen" else ():
            leaves_[index].requires_grad_(False)
        call = reference.linear_token_logps if wide else linear_token_logps
        options = {} if wide else {"plan": plan, "backend": "triton"}
        with check_hints():
            logps = call(leaves_[0], leaves_[1], targets, lora=(leaves_[2], leaves_[3], 0.5), **options)
        logps.backward(upstream.to(logps.dtype))
        found.append([logps.detach(), *(leaf.grad for leaf in leaves_)])
    ours_, expected = found
    assert [part is None for part in ours_] == [part is None for part in expected]
    assert_close(ours_[:1], expected[:1], 2e-6 if dtype == torch.float32 else 2.0**-8)
    assert_close(ours_[1:], expected[1:], 4e-6 if dtype == torch.float32 else 2.0**-6)


def test_autocast(monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", SMALL)
    h, w, _, targets, upstream = make()
    with torch.autocast(h.device.type, torch.bfloat16):
        found = ours(h, w, None, targets, upstream)
    expected = truth(h.bfloat16(), w.bfloat16(), None, targets, upstream)
    assert_close(found[:1], expected[:1], 2e-6)
    assert found[2].dtype == torch.float32
    assert_close(found[1:], expected[1:], 2.0**-8)


@pytest.mark.usefixtures("tiles")
def test_log_probs_do_not_depend_on_the_plan_or_on_gradients():
    h, w, _, targets, upstream = make()
    with torch.no_grad():
        scored = linear_token_logps(h, w, targets, backend="triton")
    for plan in ("frozen", "retain", "recompute"):
        assert torch.equal(ours(h, w, None, targets, upstream, plan=plan)[0], scored)
    kept, again = (ours(h, w, None, targets, upstream, plan=plan) for plan in ("retain", "recompute"))
    for a, b in zip(kept[1:3], again[1:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("tiles")
def test_statistics_and_ignored_rows():
    h, w, _, targets, _ = make()
    names = ("entropy", "max_is_target", "mean_logit", "log_sum_sq")
    found = linear_token_logps(h, w, targets, stats=names, backend="triton")
    expected = reference.token_stats(h.double() @ w.double().T, targets)
    for name in names:
        torch.testing.assert_close(getattr(found, name).double(), expected[name].double(), rtol=1e-5, atol=1e-5)
    assert found.logps[3] == 0.0


def test_partial_gradients_and_every_row_ignored():
    h, w, _, targets, upstream = make()
    h1, w1 = h.clone(), w.clone().requires_grad_()
    linear_token_logps(h1, w1, targets, backend="triton").backward(upstream)
    assert_close([w1.grad], [truth(h, w, None, targets, upstream)[2]], 2e-6)
    found = ours(h, w, None, torch.full_like(targets, IGNORE), upstream)
    assert all(not part.any() for part in found if part is not None)
    assert linear_token_logps(h[:0], w, targets[:0], backend="triton").shape == (0,)


def test_workspace_bounds_kept_tiles(monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", SMALL)
    arguments = make()
    assert_close(ours(*arguments, plan="retain", workspace_bytes=3000), truth(*arguments), 2e-6)


def test_linear_dpo_loss(monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", SMALL)
    h, w, _, targets, _ = make()
    ids, ref = torch.arange(9) % 4, -torch.rand(9)
    index = torch.tensor([0, 2, 0]), torch.tensor([1, 3, 3])
    found = {}
    for backend in ("triton", "torch"):
        a, b = leaves(h, w)
        out = linear_dpo_loss(a, b, targets, ids, ref, *index, num_completions=4, backend=backend)
        out.loss.backward()
        found[backend] = out.loss.detach(), a.grad, b.grad
    torch.testing.assert_close(found["triton"], found["torch"], rtol=1e-5, atol=1e-7)


def tile_of(n, v, dtype=torch.float32):
    flat = torch.randn(n, -(-v // 16) * 16)
    state = TileState.start(torch.randint(0, 3 * v, (n,)), LogitOptions())
    return flat[:, :v], state, torch.empty(n, -(-v // 16) * 16, dtype=dtype)[:, :v]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", [1024, 1000, 1003])
def test_fold_and_gradient_move_each_tile_once(v, dtype):
    z, state, out = tile_of(6, v, dtype)
    with count_traffic() as traffic:
        fold_tile(z, state, v, 0)
    assert traffic.loaded["tile"] <= 6 * v * 4 + 6 * 4
    assert sum(traffic.stored.values()) <= 6 * 20
    with count_traffic() as traffic, check_hints():
        tile_gradient(z, out, state, v, torch.ones(6), torch.ones(6))
    assert traffic.loaded["tile"] == 6 * v * 4
    assert traffic.stored["out"] == 6 * v * dtype.itemsize


def test_program_order_changes_nothing(monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", SMALL)
    arguments = make()
    expected = ours(*arguments, plan="recompute")
    for seed in range(3):
        with program_order(seed):
            found = ours(*arguments, plan="recompute")
        for a, b in zip(found[:3], expected[:3], strict=True):
            assert a is not None
            assert b is not None
            assert torch.equal(a, b)
