"""The processes of one run under torchrun: they join, add up what each computed, and end together when one fails.

Without torchrun there is one rank, and everything here does nothing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from dpo.errors import UserError

T = TypeVar("T")

TIMEOUT_MINUTES = float(os.environ.get("DPO_TIMEOUT_MINUTES", "60"))
"""How long a rank waits for the others: longer than the slowest thing that rank 0 does alone (writing a model)."""


def launched() -> bool:
    """Whether this process is one of several that torchrun (or a like launcher) started."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def local_rank() -> int:
    """This process's number on its machine: the GPU it takes."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0


def rank() -> int:
    """This process's number in the run; rank 0 prints and writes."""
    return dist.get_rank() if _joined() else 0


def ranks() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _joined() else 1


def is_main() -> bool:
    """Whether this process prints and writes the run's records."""
    return rank() == 0


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device_type: str) -> Iterator[None]:
    """Joins the processes of the run inside the block, where torchrun started several.

    Args:
        device_type: "cuda" (NCCL between GPUs, gloo for what is on the host) or "cpu" (gloo).
    """
    if not launched() or _joined():
        yield
        return
    options: dict[str, Any] = {"backend": "gloo"}
    if device_type == "cuda":
        device = torch.device("cuda", local_rank())
        torch.cuda.set_device(device)
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    dist.init_process_group(init_method="env://", timeout=timedelta(minutes=TIMEOUT_MINUTES), **options)
    _watch.start()
    yield  # where an exception leaves the block, `end_all` ends the process: the others wait in a collective
    _watch.stop()
    dist.barrier()
    dist.destroy_process_group()


def all_sum(values: Tensor) -> Tensor:
    """Adds `values` up over the ranks, in place. Waits for nothing on CUDA."""
    if ranks() > 1:
        dist.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """Every rank's `value`, in order of rank; any object that pickles (the ranks trust one another)."""
    if ranks() == 1:
        return [value]
    out: list[Any] = [None] * ranks()
    dist.all_gather_object(out, value)
    return out


def gathered_rows(values: Tensor) -> list[Tensor]:
    """Every rank's `values` [N], in order of rank; N may differ. Waits for the device, for the sizes."""
    if ranks() == 1:
        return [values]
    sizes = gathered(len(values))
    padded = torch.zeros(max(sizes), dtype=values.dtype, device=values.device)
    padded[: len(values)] = values
    held = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(held, padded)
    return [part[:size] for part, size in zip(held, sizes, strict=True)]


def on_main(function: Callable[[], T]) -> T:
    """Runs `function` on rank 0 and hands its result to all; where it raises UserError, all raise it."""
    if ranks() == 1:
        return function()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except UserError as error:
            box[1] = str(error)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise UserError(box[1])
    return box[0]


def check_same(what: str, value: object) -> None:
    """Raises UserError where the ranks do not all hold the same `value`."""
    held = gathered(value)
    for other, theirs in enumerate(held):
        if theirs != held[0]:
            raise UserError(f"{what}: expected the same on every rank, found {held[0]} on rank 0, {theirs} on {other}")


def end_all(message: str, status: int) -> NoReturn:
    """Ends every rank with `status`; the first to fail prints `message`, the others nothing.

    Ranks that wait for this one in a collective would wait for ever, or fail with an error of their own: each runs a
    thread that looks for a failure elsewhere and ends the process.
    """
    _watch.fail(message, status)


class _Watch:
    """A mark in the run's key-value store that some rank has failed, and a thread that looks for it."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._store: Any = None

    def start(self) -> None:
        # a connection of its own: a rank's first one may be blocked in a wait
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=30))
        # a restart by torchrun keeps the store
        self._store = PrefixStore(f"dpo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        self._stopped.clear()
        threading.Thread(target=self._look, daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def _look(self) -> None:
        while not self._stopped.wait(0.25):
            with contextlib.suppress(RuntimeError):  # the store is gone with the rank that held it
                if not self._store.check(["status"]):
                    continue
            if not self._stopped.is_set():
                self._leave()

    def _leave(self) -> NoReturn:
        status = 2
        with contextlib.suppress(RuntimeError):
            status = int(self._store.get("status"))
            self._store.add("gone", 1)
        _exit(status)

    def fail(self, message: str, status: int) -> NoReturn:
        self._stopped.set()
        if self._store is None:  # before the ranks have met: what is wrong here is wrong everywhere
            if os.environ.get("RANK") == "0":
                print(message, file=sys.stderr)
            _exit(status)
        first = True
        with contextlib.suppress(RuntimeError):
            first = self._store.add("failed", 1) == 1
        if not first or self._elsewhere():
            self._leave()
        print(message, file=sys.stderr, flush=True)
        # whoever waits for this rank in a collective must see the mark before it sees the connection break
        with contextlib.suppress(RuntimeError):
            self._store.set("status", str(status))
            deadline = time.monotonic() + 10
            while self._store.add("gone", 0) < ranks() - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
        _exit(status)

    def _elsewhere(self) -> bool:
        with contextlib.suppress(RuntimeError):
            return self._store.check(["status"])
        return False


_watch = _Watch()


def _exit(status: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
