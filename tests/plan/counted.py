"""What the tensors of a training run hold at the peak of its steps, counted by torch's allocator."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor

from bench.memory import allocated_peak
from dpo.cli import main
from dpo.train import Session


def counted_peak(words: Sequence[str]) -> int:
    """Bytes: `dpo WORDS` runs in this process. What is there before a step is counted tensor by tensor, for weights may
    be views of a mapped file, which no allocator knows of."""
    peaks = []
    step = Session.step

    def counted(*arguments) -> None:
        before = held()
        peaks.append(before + allocated_peak(lambda: step(*arguments)))

    others = held()
    with patch.object(Session, "step", counted):
        main(list(words))
    return max(peaks) - others


def held() -> int:
    """Bytes of all tensors on the CPU that Python can reach, shared memory once."""
    gc.collect()
    storages: dict[int, int] = {}
    for found in gc.get_objects():
        real = issubclass(type(found), torch.Tensor) and not isinstance(found, FakeTensor)
        if real and found.device.type == "cpu" and found.layout == torch.strided:
            storage = found.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
