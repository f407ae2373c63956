"""The CPU's matrix product against torch's, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from dpo_kernels.products import onednn_is_faster, takes_onednn
from torch import nn

from dpo.cpu import CpuLinear, keep_freed_memory, use_fast_products

needs_onednn = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch has no oneDNN product"
)


def _pair(features: tuple[int, int], bias: bool) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    plain = nn.Linear(*features, bias=bias)
    fast = CpuLinear(*features, bias=bias)
    fast.load_state_dict(plain.state_dict())
    return plain, fast


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 300, 17), (3, 5, 64), (2, 1, 1)])
def test_error_is_no_larger_than_torchs(shape, bias):
    plain, fast = _pair((shape[-1], 33), bias)
    exact = nn.Linear(shape[-1], 33, bias=bias).double()
    exact.load_state_dict({name: value.double() for name, value in plain.state_dict().items()})
    x, g = torch.randn(shape), torch.randn(*shape[:-1], 33)
    results = []
    for module, dtype in ((plain, torch.float32), (fast, torch.float32), (exact, torch.float64)):
        inputs = x.detach().to(dtype, copy=True).requires_grad_()
        out = module(inputs)
        out.backward(g.to(dtype))
        results.append([out, inputs.grad, *(p.grad for p in module.parameters())])
    for theirs, ours, truth in zip(*results, strict=True):
        allowance = 1e-6 * truth.abs().max()
        assert (ours - truth).abs().max() <= (theirs - truth).abs().max() + allowance


@needs_onednn
def test_it_reduces_no_precision():
    plain, fast = _pair((4096, 8), bias=False)
    x = torch.randn(16, 4096)
    truth = x.double() @ plain.weight.double().t()
    assert (fast(x) - truth).abs().max() <= 4 * (plain(x) - truth).abs().max()


def test_frozen_weights_keep_no_input():
    _, fast = _pair((64, 33), bias=True)
    fast.requires_grad_(False)
    x, g, kept = torch.randn(5, 64, requires_grad=True), torch.randn(5, 33), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        out = fast(x)
    assert x.data_ptr() not in kept
    out.backward(g)
    truth = g.double() @ fast.weight.double()
    assert x.grad is not None
    assert (x.grad - truth).abs().max() <= 1e-5 * truth.abs().max()
    assert fast.weight.grad is None


def test_float64_and_autocast_are_left_alone():
    _, fast = _pair((8, 4), bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fast(torch.randn(2, 8)).dtype == torch.bfloat16
    assert fast.double()(torch.randn(2, 8, dtype=torch.float64)).dtype == torch.float64


def test_only_plain_linears_change_and_weights_stay():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 4), Special(4, 2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    use_fast_products(model)
    assert type(model[0]) is (CpuLinear if onednn_is_faster() else nn.Linear)
    assert type(model[1]) is Special
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_memory_is_kept_without_complaint():
    keep_freed_memory()


def test_torchs_own_choice_of_product_can_be_kept(monkeypatch: pytest.MonkeyPatch):
    onednn_is_faster.cache_clear()
    try:
        monkeypatch.setenv("DPO_KERNELS_PRODUCTS", "torch")
        assert not onednn_is_faster()
        assert not takes_onednn(torch.ones(2, 2))
    finally:
        onednn_is_faster.cache_clear()
