"""What makes a training step fast on a CPU: the right matrix product, and memory that stays mapped.

Shapes: M rows, I and O input and output features.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
from typing import Any

import torch
from dpo_kernels.products import onednn_is_faster, product_nt, takes_onednn
from torch import Tensor, nn

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        out = product_nt(x.flatten(0, -2), weight)
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = product_nt(rows, weight.t()).view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        grad_weight = product_nt(rows.t(), x.flatten(0, -2).t()) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


class CpuLinear(nn.Linear):
    """nn.Linear whose fp32 products run on oneDNN; all else (float64, autocast, empty input) is nn.Linear's own."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu") or not takes_onednn(input, self.weight):
            return super().forward(input)
        return _Linear.apply(input, self.weight, self.bias)  # pyright: ignore[reportReturnType]


def use_fast_products(model: nn.Module) -> None:
    """Gives every plain nn.Linear of a model on the CPU the faster fp32 product, where there is one. Weights stay."""
    if not onednn_is_faster():
        return
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            module.__class__ = CpuLinear


def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next step: pages fresh from the kernel cost ten times a reused one."""
    if platform.libc_ver()[0] != "glibc":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20)):
            libc.mallopt(option, value)
