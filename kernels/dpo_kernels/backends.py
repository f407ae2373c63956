"""Which implementation runs: `torch` (this package's torch path) or `triton` (`dpo_kernels.tri`, where it can run)."""

import importlib
import os
from types import ModuleType

import torch

BACKENDS = ("torch", "triton")


def resolve_backend(backend: str | None, device: torch.device) -> str:
    """The backend's name. None takes `DPO_KERNELS_BACKEND`, else the torch path."""
    backend = backend or os.environ.get("DPO_KERNELS_BACKEND") or "torch"
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)} or None, found {backend!r}")
    if backend == "triton":
        triton_backend(device)
    return backend


def triton_backend(device: torch.device) -> ModuleType:
    """The Triton backend's module, or a ValueError that says why it cannot run."""
    try:
        return importlib.import_module("dpo_kernels.tri")
    except ImportError as error:
        raise ValueError(f"backend: 'triton' cannot run here on {device}: {error}") from error
