"""Which implementation runs: `torch` (this package's torch path) or `triton` (`dpo_kernels.tri`, where it can run)."""

import os

import torch

BACKENDS = ("torch", "triton")


def resolve_backend(backend: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
    """The backend's name for inputs of these dtypes on this device.

    None takes `DPO_KERNELS_BACKEND`, else the best for the device: Triton on CUDA tensors, and on CPU tensors inside an
    interpreter, where it can run; torch otherwise. ValueError where Triton is asked for and cannot run, or would run
    wrongly.
    """
    asked = backend or os.environ.get("DPO_KERNELS_BACKEND") or None
    if asked not in (None, *BACKENDS):
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, found {asked!r}")
    if asked == "torch":
        return "torch"
    problem = triton_problem(device.type, dtypes)
    if asked == "triton" and problem is not None:
        raise ValueError(f"backend: 'triton' {problem}")
    return "torch" if problem is not None else "triton"


@torch.compiler.assume_constant_result
def triton_problem(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why Triton cannot compute these inputs, or None where it can."""
    wrong = [dtype for dtype in dtypes if dtype not in (torch.float32, torch.float16, torch.bfloat16)]
    if wrong:
        return f"computes in float32: expected inputs of float32, float16 or bfloat16, found {wrong[0]}"
    if device_type not in ("cuda", "cpu"):
        return f"runs on CUDA tensors, found tensors on {device_type}"
    try:
        from . import tri
    except ImportError as error:
        return f"cannot be imported: {error}"
    if device_type == "cuda":
        return None
    return next(filter(None, (tri.interpreter_problem(dtype) for dtype in set(dtypes))), None)
