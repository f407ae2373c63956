"""Check every alignment, contiguity and constancy hint of interpreted kernels against the real values.

`tl.multiple_of` and friends are promises: a false one changes neither interpreted values nor the compiler's
acceptance, only what the GPU reads. Inside `check_hints()` each promise is compared with the addresses or indices it
was made about.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter as stock


class FalseHint(AssertionError):
    """A kernel promised the compiler something that does not hold."""


def _holds(name: str, data: np.ndarray, values: list[int]) -> bool:
    if name == "tt.divisibility":
        # Along each axis, the promise is about the first element of every contiguous run; a scalar is its own run.
        first = data.reshape(-1)[:1] if data.ndim <= 1 else data[tuple(slice(0, 1) for _ in data.shape)].reshape(-1)
        return all(int(first[0]) % int(value) == 0 for value in values)
    for axis, run in enumerate(values):
        if run <= 1 or data.ndim == 0:
            continue
        moved = np.moveaxis(data, axis, -1)
        runs = moved.reshape(*moved.shape[:-1], -1, min(int(run), moved.shape[-1])).astype(np.int64)
        steps = np.diff(runs, axis=-1)
        if steps.size and np.unique(steps).size > 1:
            return False
        if steps.size and name == "tt.constancy" and steps.flat[0] != 0:
            return False
    return True


@contextlib.contextmanager
def check_hints() -> Iterator[Counter]:
    """Raise `FalseHint` at the first false promise; yields how many of each kind were checked."""
    seen: Counter = Counter()
    original = stock.TensorHandle.set_attr

    def checked(self, key, value):
        seen[key] += 1
        if not _holds(key, np.asarray(self.data), list(value)):
            raise FalseHint(f"{key}={list(value)} does not hold for {np.asarray(self.data).reshape(-1)[:4]}")
        return original(self, key, value)

    stock.TensorHandle.set_attr = checked
    try:
        yield seen
    finally:
        stock.TensorHandle.set_attr = original
