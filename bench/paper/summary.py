"""Figure, table and JSON file of the frontier."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.paper.settings import Settings
from dpo.checkpoint import write_text

Point = dict[str, Any]
COLOURS = {
    "DPO": "#1d4ed8",
    "cDPO": "#0891b2",
    "IPO": "#7c3aed",
    "Plackett-Luce": "#15803d",
    "preferred-ft": "#a16207",
    "unlikelihood": "#b91c1c",
    "RLOO": "#c2410c",
    "Best-of-N": "#555555",
}
PACKAGES = ("torch", "transformers", "trl", "fused-dpo")


def write_results(output: Path, points: Sequence[Point], settings: Settings) -> None:
    """Write frontier.json, frontier.md and frontier.png into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    merged = merge_seeds(points)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "seeds": sorted({point["seed"] for point in points}),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "settings": dataclasses.asdict(settings),
    }
    text = json.dumps(about | {"points": list(points), "merged": merged}, indent=1)
    write_text(output / "frontier.json", text + "\n")
    write_text(output / "frontier.md", table(merged) + "\n" + findings(merged) + "\n")
    draw(merged, output / "frontier.png", about["seeds"])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def merge_seeds(points: Sequence[Point]) -> list[Point]:
    """The mean over seeds of every point, by method and KL.

    Its standard error is that of the samples; from three seeds on the spread between seeds, where that is larger.
    """
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"], point.get("n") or point["steps"]), []).append(point)
    merged = []
    for (method, setting, count), held in groups.items():
        label = f"N = {count}" if method == "Best-of-N" else setting
        if method in ("preferred-ft", "unlikelihood"):
            label += f", {count} steps"
        point: Point = {"method": method, "setting": setting, "label": label, "seeds": len(held)}
        for name in ("kl", "reward"):
            values = torch.tensor([p[name] for p in held], dtype=torch.float64)
            error = math.sqrt(sum(p[f"{name}_se"] ** 2 for p in held)) / len(held)
            if len(held) >= 3:
                error = max(error, values.std().item() / math.sqrt(len(held)))
            point |= {name: values.mean().item(), f"{name}_se": error}
        merged.append(point)
    order = ["reference", *COLOURS]
    return sorted(
        merged, key=lambda p: (order.index(p["method"]), p["setting"] if "lr" in p["setting"] else "", p["kl"])
    )


def frontier(merged: Sequence[Point], method: str) -> list[Point]:
    """The reference and the points of a method, by KL."""
    return sorted((p for p in merged if p["method"] in ("reference", method)), key=lambda p: p["kl"])


def reward_at(curve: Sequence[Point], kl: float) -> tuple[float, float] | None:
    """Reward of a curve interpolated at a KL, and its standard error; None outside of the curve.

    The error is that of the two rewards, and of their KLs through the slope.
    """
    for low, high in pairwise(curve):
        if low["kl"] <= kl <= high["kl"]:
            width = max(high["kl"] - low["kl"], 1e-12)
            part, slope = (kl - low["kl"]) / width, (high["reward"] - low["reward"]) / width
            sides = ((1 - part, low), (part, high))
            variance = sum(w**2 * (p["reward_se"] ** 2 + (slope * p["kl_se"]) ** 2) for w, p in sides)
            return (1 - part) * low["reward"] + part * high["reward"], math.sqrt(variance)
    return None


def difference(merged: Sequence[Point], point: Point) -> tuple[float, float] | None:
    """DPO's reward at the point's KL less the point's reward, and its standard error."""
    found = reward_at(frontier(merged, "DPO"), point["kl"])
    if found is None:
        return None
    return found[0] - point["reward"], math.hypot(found[1], point["reward_se"])


def table(merged: Sequence[Point]) -> str:
    """All points, each beside DPO's frontier at the same KL."""
    lines = ["| method | setting | KL | reward | DPO at this KL, less this |", "|---|---|---|---|---|"]
    for p in merged:
        against = None if p["method"] in ("reference", "DPO") else difference(merged, p)
        shown = f"{against[0]:+.3f} ± {against[1]:.3f}" if against else ""
        kl, reward = (f"{p[name]:.{d}f} ± {p[name + '_se']:.{d}f}" for name, d in (("kl", 2), ("reward", 3)))
        lines.append(f"| {p['method']} | {p['label']} | {kl} | {reward} | {shown} |")
    return "\n".join(lines) + "\n"


def findings(merged: Sequence[Point]) -> str:
    """What holds and what does not, from the points alone."""
    curve = frontier(merged, "DPO")
    lines = []
    if len(curve) > 2:
        betas = sorted((p for p in curve if p["method"] == "DPO"), key=lambda p: -float(p["setting"].split()[1]))
        steps = list(pairwise(betas))
        for name in ("kl", "reward"):
            rises = [(b[name] - a[name], math.hypot(a[f"{name}_se"], b[f"{name}_se"])) for a, b in steps]
            text = ", ".join(f"{rise:+.3f} ± {error:.3f}" for rise, error in rises)
            verdict = "rises" if all(rise > 0 for rise, _ in rises) else "does not always rise"
            lines.append(f"- DPO: {name.replace('kl', 'KL')} {verdict} as beta falls: {text}.")
    for method in COLOURS:
        compared = [d for p in merged if p["method"] == method and (d := difference(merged, p))]
        outside = sum(p["method"] == method for p in merged) - len(compared)
        if method == "DPO" or not compared:
            continue
        above, below = (sum(sign * d > 2 * e for d, e in compared) for sign in (1, -1))
        text = (
            f"- Against {method} at equal KL, DPO has more reward at {above} of {len(compared)} points by more than two"
        )
        lines.append(
            f"{text} standard errors, less at {below}" + (f"; {outside} outside its range." if outside else ".")
        )
    return "\n".join(lines)


def draw(merged: Sequence[Point], path: Path, seeds: Sequence[int]) -> None:
    """Reward against KL, a curve a method, two standard errors on either side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    for method, colour in COLOURS.items():
        settings = {p["setting"] for p in merged if p["method"] == method}
        sweeps = sorted(settings) if method in ("preferred-ft", "unlikelihood") else [None]
        for k, setting in enumerate(sweeps if settings else []):
            held = [p for p in frontier(merged, method) if setting is None or p["setting"] in ("", setting)]
            x, y = [p["kl"] for p in held], [p["reward"] for p in held]
            errors = {f"{n}err": [2 * p[f"{name}_se"] for p in held] for n, name in (("x", "kl"), ("y", "reward"))}
            style = {"linestyle": "--"} if method == "Best-of-N" else {}
            label = method if k == 0 else None
            wide = 2.2 if method == "DPO" else 1.2
            axis.errorbar(
                x,
                y,
                **errors,
                color=colour,
                marker="o",
                markersize=3,
                linewidth=wide,
                elinewidth=0.8,
                label=label,
                **style,
            )
    axis.set_xlabel("KL of policy and reference, nats per completion")
    axis.set_ylabel("reward (VADER compound)")
    number = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    axis.set_title(f"reward against KL on held-out prompts, {number}; bars: two standard errors", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(path, dpi=120)
