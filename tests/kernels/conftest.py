"""Every uninitialised allocation is filled with NaN, so that an output nobody wrote shows."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_allocations():
    torch.use_deterministic_algorithms(True)
    # torch.utils.deterministic.fill_uninitialized_memory is on by default
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
