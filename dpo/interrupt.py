"""Signals that ask a run to stop: it goes on to a point where nothing is lost, saves, and ends."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Any, TypeVar

from dpo.console import notice
from dpo.distributed import gathered
from dpo.errors import Stopped

Item = TypeVar("Item")
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Notes SIGINT and SIGTERM inside a `with` block instead of ending the process; a second one ends it at once."""

    def __init__(self) -> None:
        self.received: int | None = None  # what came to this process
        self._agreed: int | None = None  # what all ranks know to have come to one of them
        self._before: dict[int, Any] = {}
        self._owner = os.getpid()

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # only there python takes signals
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a data worker: it ends with the run, or when it is told to
            if number == signal.SIGTERM:
                raise SystemExit(128 + number)
            return
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        notice(f"{signal.Signals(number).name}: saving, then stopping (once more: stop at once)")

    def asked(self) -> bool:
        """Whether a signal came, to this rank or to another: all ranks ask together, and stop at the same point.

        A signal that comes while the ranks ask is not among their answers. It stays noted, for the next time they ask.
        """
        if self._agreed is None:
            self._agreed = max(filter(None, gathered(self.received)), default=None)
        return self._agreed is not None

    def check(self, saved: str) -> None:
        """Raises Stopped if a signal came.

        Args:
            saved: what is on the disk, for the message.
        """
        if self.asked() and self._agreed is not None:
            name = signal.Signals(self._agreed).name
            raise Stopped(f"stopped by {name}; {saved}; go on with --resume auto", 128 + self._agreed)

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, up to the signal; then Interrupted, which the caller takes as: save what is there, and `check`."""
        for item in items:
            if self.asked():
                raise Interrupted
            yield item


class Interrupted(Exception):
    """Work given up half way because a signal came."""
