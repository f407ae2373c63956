"""The demo's picture: loss, accuracy and rewards over the steps, and the held-out margins at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.curves import smooth
from dpo.metrics import read_json_lines

TRAIN, HELD_OUT, GOOD, BAD, GREY = "#1d4ed8", "#c2410c", "#15803d", "#b91c1c", "#8a8a8a"
Records = Sequence[Mapping[str, Any]]


def draw(run: Path, margins: Sequence[float], path: Path, title: str) -> None:
    """Draw a finished run into the PNG at `path`. run: its folder. margins: held-out reward margins after training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, evals = read_json_lines(run / "metrics.jsonl"), read_json_lines(run / "eval.jsonl")
    figure = Figure(figsize=(11, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rewards, histogram = figure.subplots(2, 2).flat
    _curve(loss, steps, evals, "loss")
    loss.axhline(math.log(2), color=GREY, linewidth=0.8, linestyle=":")
    loss.annotate("ln 2", (0, math.log(2)), (2, 3), textcoords="offset points", color=GREY, fontsize=8)
    loss.set_title("DPO loss")
    loss.legend(frameon=False)
    _curve(accuracy, steps, evals, "accuracy")
    accuracy.axhline(0.5, color=GREY, linewidth=0.8, linestyle=":")
    accuracy.set_ylim(0.4, 1.02)
    accuracy.set_title(
        f"reward accuracy: held out {evals[0]['accuracy']:.2f} before, {evals[-1]['accuracy']:.2f} after"
    )
    _rewards(rewards, evals)
    _margins(histogram, margins)
    second = next((record["step"] for record in steps if record["epoch"] == 1), None)
    for axis in (loss, accuracy, rewards):
        axis.set_xlabel("step")
        axis.set_xlim(0, evals[-1]["step"] * 1.02)
        if second is not None:
            axis.axvline(second, color=GREY, linewidth=0.6, alpha=0.6)
    if second is not None:
        _note(loss, "from here on, training pairs\nhave been seen before", (second, 1), (5, -20), GREY)
    for axis in (loss, accuracy, rewards, histogram):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    histogram.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=110)


def _note(
    axis: Any, text: str, at: tuple[float, float], offset: tuple[float, float], colour: str, **where: Any
) -> None:
    """Small text beside a point, given in data coordinates along x and as a fraction of the axis along y."""
    place: Any = ("data", "axes fraction")
    axis.annotate(text, at, offset, place, "offset points", color=colour, fontsize=8, **where)


def _curve(axis: Any, steps: Records, evals: Records, name: str) -> None:
    x, y = [r["step"] for r in steps], [r[name] for r in steps]
    axis.plot(x, y, color=TRAIN, linewidth=0.7, alpha=0.3)
    axis.plot(x, smooth(y, 0.8), color=TRAIN, label="training")
    axis.plot(
        [r["step"] for r in evals], [r[name] for r in evals], "o-", color=HELD_OUT, markersize=4, label="held out"
    )


def _rewards(axis: Any, evals: Records) -> None:
    x = [r["step"] for r in evals]
    for name, colour in (("margin", TRAIN), ("chosen_reward", GOOD), ("rejected_reward", BAD)):
        axis.plot(x, [r[name] for r in evals], "o-", color=colour, markersize=4, label=name.split("_")[0])
    axis.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_title("held-out rewards")
    axis.legend(frameon=False, loc=(0.7, 0.58))


def _margins(axis: Any, margins: Sequence[float]) -> None:
    """Bins are aligned to zero, so that colour changes where the sign does."""
    low, high = min(*margins, 0.0), max(*margins, 0.0)
    width = (high - low) / 36
    edges = [i * width for i in range(math.floor(low / width), math.ceil(high / width) + 1)]
    right = sum(margin > 0 for margin in margins) / len(margins)
    parts = ([m for m in margins if m <= 0], BAD, f"{1 - right:.0%} the wrong way round")
    others = ([m for m in margins if m > 0], GOOD, f"{right:.0%} with the preference")
    for values, colour, label in (others, parts):
        axis.hist(values, bins=edges, color=colour, alpha=0.75, label=label)
    axis.axvline(0, color="black", linewidth=1)
    _note(axis, "before:\nall at 0", (0, 1), (-5, -20), "black", ha="right")
    axis.set_title(f"reward margins of the {len(margins)} held-out pairs")
    axis.set_xlabel("margin: reward of chosen minus reward of rejected")
    axis.legend(frameon=False)
