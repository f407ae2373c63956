"""Measures of error for the kernel tests: ours against float64, beside torch's own in the same precision."""

import torch
from torch import Tensor

ULP = torch.finfo(torch.float32).eps


def max_error(found: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, both taken to float64; NaN where either has one."""
    return (found.detach().double() - truth.detach().double()).abs().max().item() if truth.numel() else 0.0


def leaf(tensor: Tensor, dtype: torch.dtype | None = None, *, grad: bool = True) -> Tensor:
    """A private leaf copy."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_(grad)


def gradient(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def assert_no_worse(found: Tensor, eager: Tensor, truth: Tensor, allowance: float, what: str) -> None:
    """Our largest error is at most torch's own plus the allowance."""
    ours, torchs = max_error(found, truth), max_error(eager, truth)
    assert ours <= torchs + allowance, f"{what}: error {ours:.3e}, torch's {torchs:.3e}, allowance {allowance:.1e}"


def lp_allowance(truth: Tensor) -> float:
    """Two units in the last place of the largest log-prob, in fp32."""
    finite = truth[truth.isfinite()]
    return 2 * ULP * max(1.0, finite.abs().max().item() if finite.numel() else 1.0)
