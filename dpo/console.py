"""What a run prints: notices, progress, tables. A terminal gets a live bar; a log file gets a line every so often."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

console = Console(highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """Prints one line."""
    console.print(text, markup=False)


def notice(text: str) -> None:
    """Prints one line that a user should not miss."""
    console.print(f"note: {text}", style="yellow", markup=False)


class Bar:
    """Progress over `total` units, with pairs and tokens per second and an estimate of what is left."""

    def __init__(self, label: str, total: int, *, done: int = 0, log_every: int = 0) -> None:
        self.label, self.total, self.done, self.log_every = label, total, done, log_every
        self._task: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[info]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Bar:
        self._progress.start()
        self._task = self._progress.add_task(self.label, total=self.total, completed=self.done, info="")
        self._start, self._pairs, self._tokens, self._first = time.perf_counter(), 0, 0, self.done
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self, *, pairs: int, tokens: int, info: str = "") -> None:
        """Counts one more unit; `info` is shown beside the rates."""
        self.done += 1
        self._pairs, self._tokens = self._pairs + pairs, self._tokens + tokens
        seconds = max(time.perf_counter() - self._start, 1e-9)
        text = "  ".join(
            filter(None, (info, f"{self._pairs / seconds:.1f} pairs/s", f"{self._tokens / seconds:.0f} tokens/s"))
        )
        assert self._task is not None
        self._progress.update(self._task, completed=self.done, info=text)
        due = self.log_every and (self.done % self.log_every == 0 or self.done == self.total)
        if due and not console.is_terminal:
            left = seconds / (self.done - self._first) * (self.total - self.done)
            say(f"{self.label} {self.done}/{self.total}  {text}  {left:.0f} s left")


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a table; numbers are right-aligned, the first column is the row's name."""
    out = Table(title=title, title_justify="left")
    for k, name in enumerate(columns):
        out.add_column(name, justify="left" if k == 0 else "right")
    for row in rows:
        out.add_row(*(f"{v:.4f}" if isinstance(v, float) else str(v) for v in row))
    console.print(out)


def brief(record: Mapping[str, float]) -> str:
    """The numbers of a step worth watching, on one line."""
    return f"loss {record['loss']:.4f}  accuracy {record['accuracy']:.2f}  margin {record['margin']:+.3f}"
