"""Fixtures for the Triton kernels: interpreted launches, big blocks, allocations poisoned with NaN."""

import pytest
import torch
from dpo_kernels.tri import rows

from tests.harness.interpret import interpret


@pytest.fixture
def interpreted():
    """Kernels launched on CPU tensors run in the interpreter."""
    with interpret():
        yield


@pytest.fixture
def big_blocks(monkeypatch):
    """Few, large blocks: the interpreter's time goes with their number. The rule itself is tested elsewhere."""
    monkeypatch.setattr(
        rows, "launch_for", lambda dtype, vocabulary, device: rows.Launch(16 // dtype.itemsize, 1024, 4, 8)
    )


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Every uninitialised floating-point tensor holds NaN, and every integer one a large number."""

    def poisoning(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type == "cpu" and not tensor.is_quantized:
                if tensor.dtype.is_floating_point:
                    tensor.fill_(float("nan"))
                elif tensor.dtype in (torch.int32, torch.int64):
                    tensor.fill_(2**30 + 12345)
            return tensor

        return poisoned

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
