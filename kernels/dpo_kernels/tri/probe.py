"""Whether an interpreter is there that runs kernels on CPU tensors, and computes rightly."""

# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from triton import knobs


@triton.jit
def round_kernel(x, y):
    tl.store(y, tl.load(x).to(y.dtype.element_ty))


def interpreter_problem(dtype: torch.dtype) -> str | None:
    """Why kernels cannot run on CPU tensors of this dtype, or None where they can.

    Asks by running a kernel of one cast: Triton's own interpreter truncates to bfloat16 instead of rounding, silently.
    """
    if not knobs.runtime.interpret:
        return "runs on CUDA tensors, or under an interpreter (TRITON_INTERPRET=1) on CPU tensors"
    # Halfway between 1 + 2^-7 and 1, and a little more: rounds up to the next bfloat16.
    value, rounded = torch.full((1,), 1.0 + 2.0**-8 + 2.0**-12), torch.zeros(1, dtype=dtype)
    try:
        round_kernel[(1,)](value, rounded)
    except RuntimeError as error:
        return f"found an interpreter that cannot run its kernels ({error})"
    if not torch.equal(rounded, value.to(dtype)):
        return f"would be silently wrong in {dtype} under this interpreter, which does not round to nearest"
    return None
