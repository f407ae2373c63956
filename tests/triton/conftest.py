"""Fixtures for the Triton kernels: interpreted launches, big blocks, allocations poisoned with NaN."""

import pytest
import torch
from dpo_kernels.tri import rows

from tests.harness.compiled import compiled, on_gpu
from tests.harness.interpret import interpret


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def interpreted(request, monkeypatch):
    """Kernels launched on CPU tensors run in the interpreter; in the test's twin, on a GPU, compiled."""
    with interpret() if request.param == "interpreted" else compiled(monkeypatch):
        yield


@pytest.fixture
def big_blocks(monkeypatch):
    """Few, large blocks: the interpreter's time goes with their number. The rule itself is tested elsewhere."""
    rule = rows.launch_for

    def launch_for(dtype, vocabulary, device):
        return rule(dtype, vocabulary, device) if on_gpu() else rows.Launch(16 // dtype.itemsize, 1024, 4, 8)

    monkeypatch.setattr(rows, "launch_for", launch_for)


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch):
    """Every uninitialised floating-point tensor holds NaN, and every integer one a large number."""

    def poisoning(allocate):
        def poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.device.type in ("cpu", "cuda") and not tensor.is_quantized:
                if tensor.dtype.is_floating_point:
                    tensor.fill_(float("nan"))
                elif tensor.dtype in (torch.int32, torch.int64):
                    tensor.fill_(2**30 + 12345)
            return tensor

        return poisoned

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
