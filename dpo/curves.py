"""The picture of a run: curves.png from metrics.jsonl and eval.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo.metrics import read_json_lines

_TRAIN, _EVAL = "#9db8d9", "#c2410c"


def smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        total, norm = weight * total + value, weight * norm + 1
        out.append(total / norm)
    return out


def draw_curves(run: Path) -> Path | None:
    """Draws loss, accuracy, rewards and gradient norm of a run folder into `curves.png`; None without steps."""
    steps = [r for r in read_json_lines(run / "metrics.jsonl") if r["loss"] is not None]
    evals = read_json_lines(run / "eval.jsonl") if (run / "eval.jsonl").exists() else []
    if not steps:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rewards, norm = figure.subplots(2, 2).flat
    _panel(loss, "loss", steps, evals, "loss")
    _panel(accuracy, "reward accuracy", steps, evals, "accuracy")
    accuracy.set_ylim(0, 1)
    accuracy.axhline(0.5, color="#999999", linewidth=0.8, linestyle=":")
    x = [r["step"] for r in steps]
    for name, colour in (("chosen_reward", "#15803d"), ("rejected_reward", "#b91c1c"), ("margin", "#1d4ed8")):
        rewards.plot(x, smooth([r[name] for r in steps]), color=colour, label=name.replace("_", " "))
        rewards.plot([r["step"] for r in evals], [r[name] for r in evals], "o", color=colour, markersize=3)
    rewards.set_title("implicit rewards (dots: held out)")
    rewards.legend(frameon=False)
    finite = [r for r in steps if r["grad_norm"] is not None]
    norm.semilogy([r["step"] for r in finite], [max(r["grad_norm"], 1e-12) for r in finite], color=_TRAIN)
    norm.set_title("gradient norm")
    for axis in (loss, accuracy, rewards, norm):
        axis.set_xlabel("step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / "curves.png", dpi=120)
    return run / "curves.png"


def _panel(axis: Any, title: str, steps: list[dict[str, Any]], evals: list[dict[str, Any]], name: str) -> None:
    x, y = [r["step"] for r in steps], [r[name] for r in steps]
    axis.plot(x, y, color=_TRAIN, linewidth=0.8, alpha=0.6)
    axis.plot(x, smooth(y), color="#1d4ed8", label="training")
    if evals:
        axis.plot(
            [r["step"] for r in evals], [r[name] for r in evals], "o-", color=_EVAL, markersize=4, label="held out"
        )
    axis.set_title(title)
    axis.legend(frameon=False)
