"""fp32 matrix products on the CPU through the faster of the two vendor libraries that torch carries.

Shapes: M rows, I and O input and output features.
"""

import contextlib
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor


@cache
def onednn_is_faster() -> bool:
    """Whether fp32 products should go to oneDNN: torch sends them to MKL, at half the speed on AMD processors.

    `DPO_KERNELS_PRODUCTS=torch` in the environment keeps torch's own choice.
    """
    if os.environ.get("DPO_KERNELS_PRODUCTS") == "torch":
        return False
    with contextlib.suppress(OSError):
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return False


def takes_onednn(*tensors: Tensor) -> bool:
    """Whether `product_nt` is the faster product for these operands: fp32, on the CPU, not empty."""
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in tensors)
    return plain and onednn_is_faster()


def product_nt(a: Tensor, b: Tensor) -> Tensor:
    """a [M, I] @ b [O, I].T in fp32 on oneDNN, in full precision; either may be a transposed view."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
