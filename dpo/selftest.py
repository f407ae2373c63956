"""Are the kernels right on this machine? Values and gradients of every function against float64, in a second or two.

Imports torch and dpo_kernels only, so that `python -m dpo.selftest triton cpu` is a quick child process: Triton's
interpreter must be chosen before Triton is imported. N rows, V vocabulary, H hidden, C completions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from dpo_kernels import (
    dpo_loss_from_logits,
    linear_dpo_loss,
    linear_token_logps,
    pair_loss,
    ranking_loss,
    reference,
    token_logps,
)
from torch import Tensor

Rows = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Check:
    """One comparison with float64: the largest error found, absolute, and the most allowed."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # an error that is not a number fails


def _gradient(function: Rows, leaf: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = leaf.detach().clone().requires_grad_()
    out = function(x)
    out.backward(upstream.to(out.device, out.dtype))
    assert x.grad is not None
    return out.detach().double().cpu(), x.grad.double().cpu()


def _compare(
    name: str, ours: Rows, plain: Rows, leaf: Tensor, device: str, upstream: Tensor, value_rounding: float = 0.0
) -> Iterator[Check]:
    """`ours` on the device in the leaf's dtype, against `plain` in float64 on the CPU.

    Allowed: twice what plain torch errs in fp32, plus 1e-6 of the largest value; on top of that rounding to the leaf's
    dtype for the gradient, and `value_rounding` of the largest value where logits are stored in half precision.
    """
    truth, slope = _gradient(plain, leaf.double(), upstream)
    torchs, torch_slope = _gradient(plain, leaf.float(), upstream)
    found, grad = _gradient(ours, leaf.to(device), upstream)
    rounding = 1e-6 + (0.0 if leaf.dtype == torch.float32 else torch.finfo(leaf.dtype).eps)
    for what, value, true, usual, part in (
        ("", found, truth, torchs, 1e-6 + value_rounding),
        (", gradient", grad, slope, torch_slope, rounding),
    ):
        allowed = 2 * (usual - true).abs().max() + part * true.abs().max().clamp_min(1e-3)
        yield Check(name + what, (value - true).abs().max().item(), allowed.item())


def _logps(backend: str, device: str, dtype: torch.dtype) -> Iterator[Check]:
    maker = torch.Generator().manual_seed(1)
    logits = (torch.randn(7, 131, generator=maker) * 3).to(dtype)
    targets, g = torch.randint(131, (7,), generator=maker), torch.randn(7, generator=maker)
    targets[3] = -100
    yield from _compare(
        f"token_logps {_name(dtype)}",
        lambda x: token_logps(x, targets.to(device), backend=backend),
        lambda x: reference.token_logps(x, targets),
        logits,
        device,
        g,
    )


def _head(backend: str, device: str, dtype: torch.dtype) -> Iterator[Check]:
    maker = torch.Generator().manual_seed(2)
    hidden = torch.randn(9, 32, generator=maker).to(dtype)
    weight = (torch.randn(131, 32, generator=maker) * 0.3).to(dtype)
    targets, g = torch.randint(131, (9,), generator=maker), torch.randn(9, generator=maker)
    # a bf16 product on the CPU comes out in bf16; CUDA's comes out in fp32
    stored = torch.finfo(dtype).eps / 2 if device == "cpu" and dtype != torch.float32 else 0.0
    for plan in ("frozen", "retain", "recompute"):
        held = weight.to(device).requires_grad_(plan != "frozen")
        yield from _compare(
            f"linear_token_logps {plan} {_name(dtype)}",
            lambda x, p=plan, w=held: linear_token_logps(x, w, targets.to(device), plan=p, backend=backend),  # pyright: ignore[reportArgumentType, reportReturnType]
            lambda x: reference.linear_token_logps(x, weight.to(x.dtype), targets),
            hidden,
            device,
            g,
            stored,
        )


def _losses(backend: str, device: str) -> Iterator[Check]:
    maker = torch.Generator().manual_seed(3)
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    chosen, rejected = torch.tensor([0, 2, 0]), torch.tensor([1, 3, 3])
    hidden, weight = torch.randn(9, 32, generator=maker), torch.randn(131, 32, generator=maker) * 0.3
    logits, targets = hidden @ weight.T, torch.randint(131, (9,), generator=maker)
    ref = torch.randn(9, generator=maker) - 5
    place = [t.to(device) for t in (targets, ids, ref, chosen, rejected)]
    one = torch.ones(())

    def plain(logps: Tensor) -> Tensor:
        delta = reference.completion_sums(logps - ref, ids, 4)
        return reference.pair_loss(delta, torch.zeros_like(delta), chosen, rejected)[0]

    yield from _compare(
        "dpo_loss_from_logits",
        lambda x: dpo_loss_from_logits(x, *place, num_completions=4, backend=backend).loss,
        lambda x: plain(reference.token_logps(x, targets)),
        logits,
        device,
        one,
    )
    yield from _compare(
        "linear_dpo_loss",
        lambda x: linear_dpo_loss(x, weight.to(device), *place, num_completions=4, backend=backend).loss,
        lambda x: plain(reference.linear_token_logps(x, weight.to(x.dtype), targets)),
        hidden,
        device,
        one,
    )
    delta = torch.linspace(-40.0, 3.0, 4)
    zero = torch.zeros(4, device=device)
    yield from _compare(
        "pair_loss",
        lambda x: pair_loss(x, zero, *place[3:], backend=backend).loss,
        lambda x: reference.pair_loss(x, torch.zeros_like(x), chosen, rejected)[0],
        delta,
        device,
        one,
    )
    order = torch.tensor([[2, 0, 3, 1]])

    def plackett_luce(x: Tensor) -> Tensor:
        rewards = 0.1 * x[order[0]]
        return sum((rewards[k:].logsumexp(0) - rewards[k] for k in range(4)), start=torch.zeros((), dtype=x.dtype))

    yield from _compare(
        "ranking_loss",
        lambda x: ranking_loss(x, zero, order.to(device), backend=backend).loss,
        plackett_luce,
        delta,
        device,
        one,
    )


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]


def check_kernels(backend: str, device: str, *, half: bool = True) -> list[Check]:
    """Every public function of the kernels on `device` through `backend`, values and gradients.

    half: bf16 inputs too (Triton's stock interpreter computes them wrongly).
    """
    found: list[Check] = []
    for dtype in (torch.float32, torch.bfloat16) if half else (torch.float32,):
        found += [*_logps(backend, device, dtype), *_head(backend, device, dtype)]
    return found + list(_losses(backend, device))


if __name__ == "__main__":
    chosen_backend, chosen_device = sys.argv[1:3]
    print(json.dumps([asdict(check) for check in check_kernels(chosen_backend, chosen_device, half=False)]))
