"""Count the bytes that interpreted kernels load and store, per argument, and refuse any access outside the arguments.

    with interpret(), count_traffic() as traffic:
        kernel[grid](X, Y, ...)
    traffic.loaded["X"], traffic.stored["Y"], traffic.exponentials

Requests of active lanes are counted, not DRAM transactions: caches are not modelled. Loads, stores and atomics are
seen at the interpreter's entry points, so that block pointers, descriptors and gathers are covered too.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
from triton.runtime import interpreter as stock

from tests.harness.compiled import interpreter_only


class OutOfBounds(AssertionError):
    """A kernel touched memory that belongs to none of its tensor arguments."""


class Traffic:
    """Bytes per argument name, over all launches inside the block."""

    def __init__(self):
        self.loaded: Counter = Counter()
        self.stored: Counter = Counter()
        self.atomics: Counter = Counter()
        self.launches: Counter = Counter()
        self.exponentials = 0
        self._kernel = ""
        self._spans: list[tuple[int, int, str]] = []

    def begin(self, kernel: str, named: list) -> None:
        """Start a launch of `kernel` with (name, value) arguments."""
        self._kernel, self._spans = kernel, []
        self.launches[kernel] += 1
        for name, value in named:
            if not hasattr(value, "data_ptr") or value.numel() == 0:
                continue
            extent = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
            start = value.data_ptr()
            self._spans.append((start, start + extent * value.element_size(), name))

    def record(self, counter: Counter, pointers, mask, size: int) -> None:
        """Add the bytes of the active lanes to the argument that each lane's address lies in."""
        addresses, active = np.broadcast_arrays(np.asarray(pointers), np.asarray(mask))
        left = addresses[active].astype(np.int64)
        for start, stop, name in self._spans:
            if left.size == 0:
                return
            inside = (left >= start) & (left + size <= stop)
            counter[name] += int(inside.sum()) * size
            left = left[~inside]
        if left.size:
            raise OutOfBounds(f"{self._kernel}: {left.size} lanes outside every tensor argument, first at {left[0]:#x}")


class _Counting:
    """Wraps the interpreter's native module."""

    def __init__(self, native, traffic: Traffic):
        self._native, self._traffic = native, traffic

    def __getattr__(self, name):
        return getattr(self._native, name)

    def load(self, pointers, mask, other, dtype):
        self._traffic.record(self._traffic.loaded, pointers, mask, dtype.itemsize)
        return self._native.load(pointers, mask, other, dtype)

    def store(self, pointers, value, mask):
        self._traffic.record(self._traffic.stored, pointers, mask, value.dtype.itemsize)
        return self._native.store(pointers, value, mask)

    def atomic_rmw(self, op, pointers, value, mask, sem):
        self._traffic.record(self._traffic.atomics, pointers, mask, value.dtype.itemsize)
        return self._native.atomic_rmw(op, pointers, value, mask, sem)

    def atomic_cas(self, pointers, compare, value, sem):
        everywhere = np.ones(np.shape(pointers), bool)
        self._traffic.record(self._traffic.atomics, pointers, everywhere, value.dtype.itemsize)
        return self._native.atomic_cas(pointers, compare, value, sem)


@contextlib.contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count inside the block; must be entered inside `interpret()`."""
    interpreter_only()
    traffic = Traffic()
    native, init = stock._interpreter, stock.GridExecutor._init_args_hst
    builder = stock.InterpreterBuilder
    exponentials = {name: builder.__dict__[name] for name in ("create_exp", "create_exp2")}

    def begin(self, args_dev, kwargs):
        args, kwargs = init(self, args_dev, kwargs)
        traffic.begin(self.fn.__name__, list(zip(self.arg_names, args, strict=False)) + list(kwargs.items()))
        return args, kwargs

    def counting(original):
        def create(self, arg):
            traffic.exponentials += arg.data.size
            return original(self, arg)

        return create

    stock._interpreter = _Counting(native, traffic)
    stock.GridExecutor._init_args_hst = begin
    for name, original in exponentials.items():
        setattr(builder, name, counting(original))
    try:
        yield traffic
    finally:
        stock._interpreter, stock.GridExecutor._init_args_hst = native, init
        for name, original in exponentials.items():
            setattr(builder, name, original)
