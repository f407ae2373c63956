"""Run the programs of every interpreted launch in a shuffled order: what must not depend on scheduling must not
change.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter as stock

from tests.harness.compiled import interpreter_only


@contextlib.contextmanager
def program_order(seed: int) -> Iterator[None]:
    """Inside the block, launches visit their grid in a permutation drawn from `seed`."""
    interpreter_only()
    builder = stock.InterpreterBuilder
    original = builder.set_grid_idx

    def shuffled(self, x, y, z):
        nx, ny, nz = self.grid_dim
        order = np.random.default_rng(seed).permutation(nx * ny * nz)
        place = int(order[(x * ny + y) * nz + z])
        original(self, place // (ny * nz), place // nz % ny, place % nz)

    builder.set_grid_idx = shuffled
    try:
        yield
    finally:
        builder.set_grid_idx = original
