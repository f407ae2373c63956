"""The update: clipping, skipping, RMSprop, the learning rate."""

from __future__ import annotations

import math

import pytest
import torch

from dpo.optim import RMSprop, apply_update, build_optimizer, warmup_then_constant

SHAPES = [(33, 7), (5,), (1, 1)]


def _params(dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_rmsprop_is_torchs(dtype, bound, weight_decay):
    ours, theirs = _params(dtype), _params(dtype)
    a = RMSprop(ours, lr=1e-2, weight_decay=weight_decay)
    b = torch.optim.RMSprop(theirs, lr=1e-2, weight_decay=weight_decay)
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        a.step()
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=bound, atol=bound)
        torch.testing.assert_close(a.state[x]["square_avg"], b.state[y]["square_avg"], rtol=bound, atol=bound)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
def test_clipping_equals_scaled_gradients(name):
    clipped, scaled = _params(torch.float32), _params(torch.float32)
    a, b = (build_optimizer(name, params, lr=1e-2) for params in (clipped, scaled))
    for _ in range(3):
        grads = [torch.randn(shape) for shape in SHAPES]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
        for x, y, g in zip(clipped, scaled, grads, strict=True):
            x.grad, y.grad = g.clone(), g * (2.0 / norm)
        update = apply_update(a, torch.tensor(1.0), grad_clip=2.0)
        apply_update(b, torch.tensor(1.0), grad_clip=0.0)
        assert update.grad_norm.item() == pytest.approx(norm, rel=1e-6)
        assert norm > 2.0
    for x, y in zip(clipped, scaled, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", ["rmsprop", "adamw"])
@pytest.mark.parametrize(("loss", "poison"), [(1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (math.inf, 1.0)])
def test_nothing_changes_when_loss_or_gradient_is_not_finite(name, loss, poison):
    params = _params(torch.float32)
    optimizer = build_optimizer(name, params, lr=1e-2)
    for p in params:
        p.grad = torch.ones_like(p)
    assert apply_update(optimizer, torch.tensor(1.0), 10.0).skipped.item() == 0.0
    held = [p.detach().clone() for p in params]
    state = [value.clone() for p in params for value in optimizer.state[p].values()]
    for p in params:
        p.grad = torch.full_like(p, poison)
    assert apply_update(optimizer, torch.tensor(loss), 10.0).skipped.item() == 1.0
    for p, before in zip(params, held, strict=True):
        assert torch.equal(p, before)
    for value, before in zip((v for p in params for v in optimizer.state[p].values()), state, strict=True):
        assert torch.equal(value, before)


def test_learning_rate_rises_then_stays():
    rates = [warmup_then_constant(step, 1.0, 3) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_then_constant(0, 2.0, 0) == 2.0
