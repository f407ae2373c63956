"""The compiled twin of an interpreted test: the very same test with its tensors on a GPU, where launches are real.

Checks that look into the interpreter (bytes, program order) skip in a twin; checks of alignment hints pass through.
"""

import contextlib
from collections.abc import Iterator

import pytest
import torch

_on_gpu = False


def on_gpu() -> bool:
    return _on_gpu


def interpreter_only() -> None:
    """Skip a twin that would look at interpreted launches."""
    if _on_gpu:
        pytest.skip("looks at interpreted launches")


@contextlib.contextmanager
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the block new tensors, and generators of random ones, are on the GPU."""
    global _on_gpu
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cuda": generator(device))
    _on_gpu = True
    try:
        with torch.device("cuda"):
            yield
    finally:
        _on_gpu = False
