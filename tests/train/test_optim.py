"""The update: clipping, skipping, RMSprop, the learning rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dpo.errors import UserError
from dpo.optim import OPTIMIZERS, RMSprop, Schedule, apply_update, build_optimizer
from dpo.precision import Average, LossScale, MasterWeights, RoundedWeights, Weights
from dpo.rounding import PIECE, mixed, round_at_random

SHAPES = [(33, 7), (5,), (1, 1)]
# torch's own class by our name, with what ours is built with besides lr
TORCHS = {name: getattr(torch.optim, kind.__name__) for name, kind in OPTIMIZERS.items()}


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


def _decay(name: str) -> dict[str, Any]:
    return {} if name == "rprop" else {"weight_decay": 0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_is_torchs_in_float64(name):
    ours, theirs = _params(torch.float64), _params(torch.float64)
    a = build_optimizer(name, ours, lr=1e-2, **_decay(name))
    b = TORCHS[name](theirs, lr=1e-2, **_decay(name))
    for _ in range(5):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        assert apply_update(a, torch.tensor(1.0), grad_clip=0.0).skipped.item() == 0.0
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rmsprop", {"alpha": 0.9, "eps": 1e-4}),
        ("adamw", {"betas": [0.5, 0.6], "eps": 1e-3, "amsgrad": True}),
        ("sgd", {"momentum": 0.9, "nesterov": True}),
        ("adagrad", {"initial_accumulator_value": 0.5}),
    ],
    ids=str,
)
def test_options_reach_the_optimizer(name, options):
    ours, theirs = _params(torch.float64), _params(torch.float64)
    a = build_optimizer(name, ours, lr=1e-2, options=options)
    as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    b = TORCHS[name](theirs, lr=1e-2, weight_decay=0.0, **as_tuples)
    for _ in range(3):
        for x, y in zip(ours, theirs, strict=True):
            x.grad = torch.randn_like(x)
            y.grad = x.grad.clone()
        apply_update(a, torch.tensor(1.0), grad_clip=0.0)
        b.step()
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rmsprop", {"options": {"momentum": 0.9}}, r"expected options of rmsprop \(alpha, eps\), found 'momentum'"),
        ("adamw", {"options": {"lr": 1.0}}, "found 'lr'"),
        ("adamw", {"options": {"betas": [2.0, 0.9]}}, "--optimizer-options: adamw: Invalid beta"),
        ("sgd", {"options": {"nesterov": True}}, "--optimizer-options: sgd: Nesterov momentum requires"),
        ("rprop", {"weight_decay": 0.1}, "--weight-decay: expected an optimizer that has it, found rprop"),
    ],
    ids=str,
)
def test_options_that_an_optimizer_does_not_have_are_refused(name, arguments, message):
    with pytest.raises(UserError, match=message):
        build_optimizer(name, _params(torch.float32), lr=1e-2, **arguments)


@pytest.mark.parametrize("name", OPTIMIZERS)
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


@pytest.mark.parametrize("name", OPTIMIZERS)
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
    rates = [Schedule("paper", 1.0, 3, 6)(step) for step in range(6)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Schedule("paper", 2.0, 0, 6)(0) == Schedule("constant", 2.0, 0, 6)(5) == 2.0


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("end", [0.0, 0.25])
@pytest.mark.parametrize("warmup", [0, 4])
def test_schedules_are_torchs(kind, end, warmup):
    total = 17
    optimizer = torch.optim.SGD(_params(torch.float64), lr=0.3)
    schedulers = torch.optim.lr_scheduler
    falling = total - warmup
    theirs = (
        schedulers.LinearLR(optimizer, 1.0, end or 1e-30, falling)
        if kind == "linear"
        else schedulers.CosineAnnealingLR(optimizer, falling, eta_min=0.3 * end)
    )
    ours = Schedule(kind, 0.3, warmup, total, end)
    for step in range(warmup):
        assert ours(step) == pytest.approx(0.3 * (step + 1) / (warmup + 1), rel=1e-14)
    for step in range(warmup, total):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        theirs.step()
    assert ours(total - 1) > 0.3 * end


def test_a_scaled_loss_gives_the_same_update_and_an_overflow_none():
    plain, scaled = _params(torch.float32), _params(torch.float32)
    a, b = (build_optimizer("adamw", params, lr=1e-2) for params in (plain, scaled))
    scale = LossScale(torch.device("cpu"), start=1024.0, interval=2)
    for step in range(4):
        grads = [torch.randn(shape) for shape in SHAPES]
        for x, y, g in zip(plain, scaled, grads, strict=True):
            x.grad, y.grad = g.clone(), g * scale.scale
        first = apply_update(a, torch.tensor(1.0), grad_clip=1.0)
        second = apply_update(b, torch.tensor(1.0), grad_clip=1.0, loss_scale=scale)
        assert second.grad_norm.item() == pytest.approx(first.grad_norm.item(), rel=1e-6)
        assert scale.scale.item() == 1024.0 * 2 ** ((step + 1) // 2)
    for x, y in zip(plain, scaled, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    held = [p.detach().clone() for p in scaled]
    again = LossScale(torch.device("cpu"))
    again.load_state_dict(scale.state_dict())
    for expected in (2048.0, 1024.0):
        for p in scaled:
            p.grad = torch.full_like(p, math.inf)
        update = apply_update(b, torch.tensor(1.0), 0.0, loss_scale=again)
        assert (update.skipped.item(), update.overflow.item(), again.scale.item()) == (1.0, 1.0, expected)
    for p in scaled:
        p.grad = torch.ones_like(p)
    fault = apply_update(b, torch.tensor(math.nan), 0.0, loss_scale=again)
    assert (fault.skipped.item(), fault.overflow.item()) == (1.0, 0.0)
    assert all(torch.equal(p, before) for p, before in zip(scaled, held, strict=True))
    again.scale.fill_(1.0)
    for p in scaled:
        p.grad = torch.full_like(p, math.inf)
    assert apply_update(b, torch.tensor(1.0), 0.0, loss_scale=again).overflow.item() == 0.0


@pytest.mark.parametrize("name", ["rmsprop", "adamw", "adagrad", "nadam"])
def test_master_weights_are_an_fp32_run_with_rounded_parameters(name):
    """Against the optimizer in float64 that is fed the same gradients of two bins each."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    truth = [p.detach().double().requires_grad_() for p in params]
    weights = MasterWeights(params)
    ours, theirs = build_optimizer(name, weights.targets, lr=1e-4), TORCHS[name](truth, lr=1e-4, weight_decay=0.0)
    for _ in range(20):
        grads = [[torch.randn(shape).bfloat16() for shape in SHAPES] for _ in range(2)]
        for bin_grads in grads:
            torch.stack([(p * g).sum() for p, g in zip(params, bin_grads, strict=True)]).sum().backward()
        assert all(p.grad is None for p in params)
        for k, y in enumerate(truth):
            y.grad = grads[0][k].double() + grads[1][k].double()
        apply_update(ours, torch.tensor(1.0), 0.0, weights=weights)
        theirs.step()
    for p, master, y in zip(params, weights.fp32(), truth, strict=True):
        torch.testing.assert_close(master.double(), y, rtol=1e-6, atol=1e-6)
        assert torch.equal(p, master.bfloat16())
    again = MasterWeights(params)
    again.load_state_dict(weights.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.fp32(), weights.fp32(), strict=True))


def test_rounding_at_random_is_to_a_neighbour_and_right_on_average():
    values = torch.tensor([1.0, 1.0 + 2**-9, -1.0 - 3 * 2**-10, 3.1415927, 1e-40, 0.0, math.inf, -math.inf, math.nan])
    draws = torch.stack([round_at_random(values, mixed(0, k)) for k in range(20_000)]).double()
    below = values.view(torch.int32).bitwise_and(~0xFFFF).view(torch.float32).double()
    ulp = torch.tensor([2**-7, 2**-7, 2**-7, 2**-6], dtype=torch.float64)
    assert ((draws - below)[:, :4].abs() <= ulp).all()
    assert torch.equal(draws[:, 0], torch.ones(20_000, dtype=torch.float64))
    error = (draws[:, :4].mean(0) - values[:4].double()).abs()
    assert (error <= 5 * ulp * 0.5 / math.sqrt(20_000)).all()  # five standard deviations
    assert draws[0, 5:8].tolist() == [0.0, math.inf, -math.inf]
    assert draws[:, 8].isnan().all()


def test_what_is_drawn_depends_on_the_element_alone():
    """Cut anywhere, across the pieces in which it is drawn: the same bits; other keys and elements: others."""
    values = torch.full((PIECE + 5000,), 1.0 + 2**-8)  # half-way between two neighbours
    whole = round_at_random(values, mixed(1, 2, 3)).float()
    for start, end in ((0, 7), (5, PIECE + 3), (PIECE - 2, PIECE + 5000), (PIECE, PIECE + 1)):
        part = round_at_random(values[start:end], mixed(1, 2, 3), start).float()
        assert torch.equal(part, whole[start:end])
    up = (whole > 1.004).double()
    n = len(up)
    assert abs(up.mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)
    others = [(round_at_random(values, mixed(*key)) > 1.004).double() for key in ((1, 2, 4), (1, 3, 3), (2, 2, 3))]
    shifted = [up.roll(k) for k in (1, 2, 64, PIECE)]
    for other in (*others, *shifted):
        correlation = ((up - 0.5) * (other - 0.5)).mean().item() * 4
        assert abs(correlation) < 6 / math.sqrt(n)


@pytest.mark.parametrize("name", ["rmsprop", "adamw", "adagrad", "adafactor"])
def test_updates_too_small_for_bf16_count_on_average(name):
    def held_in_fp32(weights: RoundedWeights) -> int:
        return sum(target.untyped_storage().nbytes() for target in weights.targets)

    def run(seed: int, chunk: int) -> list[torch.Tensor]:
        params = [torch.nn.Parameter(torch.ones(40, 50, dtype=torch.bfloat16)) for _ in range(3)]
        weights = RoundedWeights(params, seed, chunk=chunk)
        optimizer = build_optimizer(name, weights.targets, lr=1e-4)
        assert held_in_fp32(weights) == 0
        for _ in range(10):
            torch.stack([p.sum() for p in params]).sum().backward()
            apply_update(optimizer, torch.tensor(1.0), 0.0, weights=weights)
        assert held_in_fp32(weights) == 0
        before = [p.detach().clone() for p in params]
        torch.stack([p.sum() for p in params]).sum().backward()
        assert apply_update(optimizer, torch.tensor(math.nan), 0.0, weights=weights).skipped.item() == 1.0
        assert all(torch.equal(p, held) for p, held in zip(params, before, strict=True))
        return before

    (truth,) = exact = [torch.ones(40, 50, dtype=torch.float64).requires_grad_()]
    optimizer = TORCHS[name](exact, lr=1e-4, weight_decay=0.0)
    for _ in range(10):
        before = truth.mean().item()
        truth.grad = torch.ones_like(truth)
        optimizer.step()
        assert 0 < before - truth.mean().item() < 2**-9  # rounding to the nearest would stay at 1
    moved = 1.0 - truth.mean().item()
    ours = run(0, 1)
    mean = 1.0 - torch.stack(ours).double().mean().item()
    assert mean == pytest.approx(moved, rel=0.1)
    assert all(torch.equal(a, b) for a, b in zip(run(0, 1 << 20), ours, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(run(1, 1), ours, strict=True))


def test_the_average_is_exponential_and_leaves_the_weights_alone():
    params = [torch.nn.Parameter(p.detach()) for p in _params(torch.float32)]
    weights = Weights(params)
    average = Average(params, weights, decay=0.75)
    truth = [p.detach().double() for p in params]
    for _ in range(5):
        for k, p in enumerate(params):
            p.data += torch.randn_like(p)
            truth[k] = 0.75 * truth[k] + 0.25 * p.detach().double()
        average.update()
    raw = [p.detach().clone() for p in params]
    with average.applied():
        for p, expected in zip(params, truth, strict=True):
            torch.testing.assert_close(p.double(), expected, rtol=1e-6, atol=1e-6)
    assert all(torch.equal(p, before) for p, before in zip(params, raw, strict=True))
