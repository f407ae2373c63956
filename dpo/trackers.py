"""Live curves beside the run folder: TensorBoard, Weights & Biases, trackio. Imported only when they are used."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from dpo.config import TrainConfig, to_settings
from dpo.errors import UserError


class Tracker(Protocol):
    """Where numbers and texts of a run go."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...
    def histogram(self, step: int, name: str, values: Sequence[float]) -> None: ...
    def text(self, step: int, name: str, text: str) -> None: ...
    def close(self) -> None: ...


def chosen_trackers(config: TrainConfig) -> list[str]:
    """The trackers of a run: --log-to, or TensorBoard where it is installed.

    Raises UserError for one that is asked for and not installed.
    """
    if config.log_to is None:
        return ["tensorboard"] if _installed("tensorboard") else []
    for name in config.log_to:
        if name != "none" and not _installed(name):
            raise UserError(f"--log-to {name}: expected it installed (pip install {name}), found none")
    return [name for name in config.log_to if name != "none"]


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def open_trackers(run: Path, config: TrainConfig, *, start: int) -> list[Tracker]:
    """Opens the trackers of a run; one that goes on at step `start` goes on where it was."""
    kinds: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": Service, "trackio": Service}
    return [kinds[name](name, run, config, start) for name in chosen_trackers(config)]


_PATIENCE = 10.0
"""Seconds that the end of a run waits for TensorBoard's files."""


class TensorBoard:
    """Event files in tensorboard/ of the run folder."""

    def __init__(self, name: str, run: Path, config: TrainConfig, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / name), purge_step=start or None)
        if not start:
            rows = [f"| {key} | {value} |" for key, value in to_settings(config).items()]
            self.text(0, "settings", "\n".join(["| setting | value |", "|---|---|", *rows]))

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        import numpy as np

        self.writer.add_histogram(name, np.asarray(values), step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        # its writer is a thread of its own: one that died of a full disk would be waited for without end
        closing = threading.Thread(target=self.writer.close, daemon=True)
        closing.start()
        closing.join(_PATIENCE)


class Service:
    """Weights & Biases, or trackio, which has its interface. WANDB_PROJECT and TRACKIO_PROJECT name the project."""

    def __init__(self, name: str, run: Path, config: TrainConfig, start: int) -> None:
        self.module = importlib.import_module(name)
        project = os.environ.get(f"{name.upper()}_PROJECT", "fused-dpo")
        options: dict[str, Any] = {"project": project, "config": to_settings(config), "resume": "allow"}
        if name == "wandb":
            options |= {"name": run.name, "dir": str(run), "id": _identity(run, new=not start)}
        else:
            options["name"] = f"{run.name}-{_identity(run, new=not start)}"  # trackio knows a run by its name
        self.run = self.module.init(**options)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.module.log(dict(values), step=step)

    def histogram(self, step: int, name: str, values: Sequence[float]) -> None:
        self.module.log({name: self.module.Histogram(list(values))}, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        table = self.module.Table(columns=["text"], data=[[text]])
        self.module.log({name: table}, step=step)

    def close(self) -> None:
        self.module.finish()


def _identity(run: Path, *, new: bool) -> str:
    """A name for the run that no other has, kept in its folder so that its continuation finds it."""
    path = run / "tracker_id"
    if new or not path.exists():
        path.write_text(uuid4().hex[:12])
    return path.read_text()


def finite(record: Mapping[str, Any], prefix: str, leave_out: Sequence[str] = ("step", "epoch")) -> dict[str, float]:
    """The numbers of a record that can be drawn, named `prefix/name`."""
    return {
        f"{prefix}/{name}": float(value)
        for name, value in record.items()
        if name not in leave_out and isinstance(value, int | float) and math.isfinite(value)
    }
