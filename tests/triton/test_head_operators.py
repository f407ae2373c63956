"""The LM head as an operator: opcheck with dynamic shapes, and compiled whole graphs at several sizes."""

from typing import Any

import pytest
import torch
from dpo_kernels import head_operators, linear_dpo_loss, linear_token_logps, plans
from dpo_kernels.storage import Needs
from torch._dynamo.testing import CompileCounterWithBackend

ALL = (True,) * 5


@pytest.fixture
def poisoned_allocations():
    """Not here: opcheck compares whole outputs, and kept memory is not all written."""


@pytest.fixture(autouse=True)
def blank_allocations(monkeypatch):
    """Memory that nobody writes compares equal."""
    empty = torch.empty

    def blank(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.zero_() if type(tensor) is torch.Tensor else tensor

    monkeypatch.setattr(torch, "empty", blank)


@pytest.fixture(params=[(8, 8 * 32), pytest.param((512, 1 << 20), marks=pytest.mark.slow)], ids=["many", "one"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(plans, "TILE_ROWS", request.param[0])
    monkeypatch.setattr(plans, "TILE_ELEMENTS", request.param[1])
    monkeypatch.setattr(plans, "GPU_TILE", request.param)


def operands(n=21, vocabulary=75, width=12, rank=3, dtype=torch.float32, needed=ALL):
    """hidden, weight, bias, low, factor, targets."""
    shapes = (n, width), (vocabulary, width), (vocabulary,), (n, rank), (vocabulary, rank)
    floats = [torch.randn(shape).to(dtype).requires_grad_(need) for shape, need in zip(shapes, needed, strict=True)]
    targets = torch.randint(0, vocabulary, (n,))
    targets[1::4] = -100
    return *floats, targets


def numbers(plan, needed, *, stats=0, workspace=-1, reuse=False, compute=torch.float32, backend="torch", softcap=0.0):
    return Needs(*needed).mask, -100, 0.8, 1.5, softcap, stats, plan, workspace, reuse, compute, backend, ""


@pytest.mark.usefixtures("interpreted", "tiles")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("plan", "needed", "more"),
    [
        ("retain", ALL, {}),
        ("retain", ALL, {"workspace": 3000, "softcap": 5.0}),
        pytest.param("recompute", ALL, {"stats": 15}, marks=pytest.mark.slow),
        ("frozen", (True, False, False, True, False), {}),
        pytest.param("auto", (True, False, False, True, True), {}, marks=pytest.mark.slow),
        ("auto", (False,) * 5, {"stats": 5}),
    ],
    ids=str,
)
def test_opcheck(backend, plan, needed, more):
    """Schema, autograd registration, fake tensors, ahead-of-time tracing with dynamic shapes."""
    arguments = operands(needed=needed)
    torch.library.opcheck(
        head_operators.linear_token_logps, (*arguments, *numbers(plan, needed, backend=backend, **more))
    )


@pytest.mark.usefixtures("interpreted", "tiles")
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("plan", ["retain", pytest.param("recompute", marks=pytest.mark.slow), "frozen"])
@pytest.mark.parametrize("reuse", [False, True])
def test_opcheck_of_the_backward(backend, plan, reuse):
    needed = (True, False, False, True, False) if plan == "frozen" else ALL
    arguments = operands(needed=(False,) * 5)
    options = numbers(plan, needed, reuse=reuse, backend=backend)
    logps, _, *kept = head_operators.linear_token_logps(*arguments, *options)
    rows = torch.randn(21), *arguments, logps, *kept
    backward = head_operators.linear_token_logps_backward_ if reuse else head_operators.linear_token_logps_backward
    torch.library.opcheck(backward, (*rows, Needs(*needed).mask, *options))


def gradients(function, *tensors):
    leaves = [part.detach().clone().requires_grad_() for part in tensors]
    loss = function(*leaves)
    loss.backward()
    return [loss.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.usefixtures("interpreted", "tiles")
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize("plan", ["auto", pytest.param("recompute", marks=pytest.mark.slow)])
def test_compiled_whole_graph(backend, plan):
    """No graph break, and no new graph for a new size; log-probs and loss, every gradient."""
    torch._dynamo.reset()
    index = {"chosen": torch.tensor([0, 2]), "rejected": torch.tensor([1, 3]), "num_completions": 4}

    def step(targets, ids, hidden, weight, bias, a, b):
        options: dict[str, Any] = {"bias": bias, "lora": (a, b, 0.5), "plan": plan, "backend": backend}
        logps = linear_token_logps(hidden, weight, targets, softcap=6.0, **options)
        return logps.sum() + linear_dpo_loss(hidden, weight, targets, ids, None, **index, **options).loss

    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for n in (21, 30, 66):
        hidden, weight, bias, low, b, targets = operands(n)
        tensors, ids = (hidden, weight, bias, torch.randn(low.shape[1], 12), b), torch.arange(n) % 4
        eager = gradients(lambda *given, t=targets, i=ids: step(t, i, *given), *tensors)
        traced = gradients(lambda *given, t=targets, i=ids: compiled(t, i, *given), *tensors)
        torch.testing.assert_close(traced, eager)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


@pytest.mark.usefixtures("interpreted")
def test_compiled_frozen_head_and_statistics():
    torch._dynamo.reset()

    def step(hidden, weight, targets):
        found = linear_token_logps(hidden, weight, targets, stats=("entropy", "max_is_target"), backend="torch")
        assert found.entropy is not None
        assert found.max_is_target is not None
        return found.logps.sum() + found.entropy.sum() + found.max_is_target.sum()

    _, weight, *_, targets = operands(needed=(False,) * 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (21, 22):
        hidden = torch.randn(n, 12)
        goal = targets.repeat(2)[:n]
        found = [gradients(lambda h, f=f, t=goal: f(h, weight, t), hidden) for f in (step, compiled)]
        torch.testing.assert_close(*found)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("per", "options"),
    [
        pytest.param("token", {"ld_alpha": 0.5, "loss": "sigmoid:1,sft:0.1"}, marks=pytest.mark.slow),
        ("completion", {"loss": "ipo", "reduction": "none", "wpo": True}),
        pytest.param("token", {"loss": "aot"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_loss_compiles_whole_behind_the_head(backend, per, options):
    """What `linear_dpo_loss` adds to the head's operator is torch's own arithmetic on a number a row and a pair: left
    open, so that a compiler fuses it. Weights, references and options; two sizes, one graph."""
    torch._dynamo.reset()
    index = {"chosen": torch.tensor([0, 2, 0]), "rejected": torch.tensor([1, 3, 3]), "num_completions": 4}
    weights = None if options["loss"] == "aot" else torch.tensor([1.0, 0.5, 2.0])

    def step(targets, ids, ref, hidden, weight):
        options_ = {**options, "pair_weights": weights, "backend": backend}
        return linear_dpo_loss(hidden, weight, targets, ids, ref, **index, **options_).loss.sum()

    counter, graphs = CompileCounterWithBackend("aot_eager"), set()
    compiled = torch.compile(step, fullgraph=True, backend=counter, dynamic=True)
    for n in (21, 30):
        hidden, weight, *_, targets = operands(n)
        ids = (torch.arange(n) // 5).clamp(max=3)
        ref = -torch.rand(n if per == "token" else 4)
        found = [gradients(lambda h, w, f=f, t=targets, i=ids, r=ref: f(t, i, r, h, w), hidden, weight)
                 for f in (step, compiled)]  # fmt: skip
        torch.testing.assert_close(*found)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1
