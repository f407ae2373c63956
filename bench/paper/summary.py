"""Figure, table and JSON file of the frontier."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from bench.paper.settings import Settings
from dpo.checkpoint import write_text

Point = dict[str, Any]
Estimate = tuple[float, float]
"""A mean and its standard error."""
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
SWEPT = ("preferred-ft", "unlikelihood")
"""Methods without a beta: measured at several steps."""
OTHERS = [method for method in COLOURS if method != "DPO"]
EQUAL_KL = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
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
    parts = table(merged, differences(points)), equal_kl_table(at_equal_kl(points)), findings(points)
    write_text(output / "frontier.md", "\n".join(parts) + "\n")
    draw(merged, output / "frontier.png", about["seeds"])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def mean_over_seeds(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error: that of the samples; from three seeds on the seeds' spread, if larger."""
    held = torch.tensor(values, dtype=torch.float64)
    error = math.hypot(*errors) / len(held)
    if len(held) >= 3:
        error = max(error, held.std().item() / math.sqrt(len(held)))
    return held.mean().item(), error


def merge_seeds(points: Sequence[Point]) -> list[Point]:
    """The mean over seeds of every point, by method and KL, each with its standard error."""
    groups: dict[tuple[str, str, int], list[Point]] = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"], point.get("n") or point["steps"]), []).append(point)
    merged = []
    for (method, setting, count), held in groups.items():
        label = f"N = {count}" if method == "Best-of-N" else setting
        if method in SWEPT:
            label += f", {count} steps"
        point: Point = {"method": method, "setting": setting, "label": label, "count": count, "seeds": len(held)}
        for name in ("kl", "reward"):
            mean, error = mean_over_seeds([p[name] for p in held], [p[f"{name}_se"] for p in held])
            point |= {name: mean, f"{name}_se": error}
        merged.append(point)
    order = ["reference", *COLOURS]
    return sorted(
        merged, key=lambda p: (order.index(p["method"]), p["setting"] if p["method"] in SWEPT else "", p["kl"])
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


def over_seeds(points: Sequence[Point], of_one: Callable[[list[Point]], dict[Any, Estimate | None]]) -> dict[Any, Any]:
    """What `of_one` finds in the points of each seed, averaged: seeds differ in reference and prompts, so what is
    compared is compared within a seed. None where any seed has none."""
    seeds = sorted({point["seed"] for point in points})
    found = [of_one(merge_seeds([p for p in points if p["seed"] == seed])) for seed in seeds]
    means = {}
    for key in {key: None for one in found for key in one}:
        held = [one.get(key) for one in found]
        whole = [value for value in held if value is not None]
        means[key] = mean_over_seeds(*zip(*whole, strict=True)) if len(whole) == len(seeds) else None
    return means


def differences(points: Sequence[Point]) -> dict[tuple[str, str], Estimate | None]:
    """`difference` of every point that is not DPO's, by method and label."""

    def of_one(merged: list[Point]) -> dict[Any, Estimate | None]:
        return {(p["method"], p["label"]): difference(merged, p) for p in merged if p["method"] in OTHERS}

    return over_seeds(points, of_one)


def at_equal_kl(points: Sequence[Point]) -> dict[tuple[str, float], Estimate | None]:
    """Reward of every method at the divergences of EQUAL_KL; of a method swept by steps, along its last points."""

    def of_one(merged: list[Point]) -> dict[Any, Estimate | None]:
        found = {}
        for method in COLOURS:
            last = max((p["count"] for p in merged if p["method"] == method), default=0)
            curve = frontier(merged, method)
            curve = [p for p in curve if method not in SWEPT or p["method"] == "reference" or p["count"] == last]
            found |= {(method, kl): reward_at(curve, kl) for kl in EQUAL_KL}
        return found

    return over_seeds(points, of_one)


def table(merged: Sequence[Point], against: Mapping[tuple[str, str], Estimate | None]) -> str:
    """All points, each beside DPO's frontier at the same KL."""
    lines = ["| method | setting | KL | reward | DPO at this KL, less this |", "|---|---|---|---|---|"]
    for p in merged:
        found = against.get((p["method"], p["label"]))
        shown = f"{found[0]:+.3f} ± {found[1]:.3f}" if found else ""
        kl, reward = (f"{p[name]:.{d}f} ± {p[name + '_se']:.{d}f}" for name, d in (("kl", 2), ("reward", 3)))
        lines.append(f"| {p['method']} | {p['label']} | {kl} | {reward} | {shown} |")
    return "\n".join(lines) + "\n"


def equal_kl_table(rewards: Mapping[tuple[str, float], Estimate | None]) -> str:
    """The rewards of `at_equal_kl`, a row a method; empty where a method does not reach."""
    lines = ["| reward at KL | " + " | ".join(f"{kl:g}" for kl in EQUAL_KL) + " |", "|---" * (len(EQUAL_KL) + 1) + "|"]
    for method in COLOURS:
        found = [rewards.get((method, kl)) for kl in EQUAL_KL]
        if any(found):
            cells = (f"{value[0]:.3f} ± {value[1]:.3f}" if value else "" for value in found)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rises(points: Sequence[Point]) -> dict[str, list[Estimate]]:
    """By how much DPO's KL and reward rise from each beta to the next smaller one, at one learning rate."""

    def of_one(merged: list[Point]) -> dict[Any, Estimate | None]:
        held = [p for p in merged if p["method"] == "DPO" and "lr" not in p["setting"]]
        betas = sorted(held, key=lambda p: -float(p["setting"].split()[1]))
        return {
            (name, b["setting"]): (b[name] - a[name], math.hypot(a[f"{name}_se"], b[f"{name}_se"]))
            for name in ("kl", "reward")
            for a, b in pairwise(betas)
        }

    found = {key: rise for key, rise in over_seeds(points, of_one).items() if rise is not None}
    return {name: [rise for (n, _), rise in found.items() if n == name] for name in ("kl", "reward")}


def findings(points: Sequence[Point]) -> str:
    """What holds and what does not, from the points alone."""
    lines = []
    for name, found in rises(points).items():
        text = ", ".join(f"{rise:+.3f} ± {error:.3f}" for rise, error in found)
        verdict = "rises" if all(rise > 0 for rise, _ in found) else "does not always rise"
        if found:
            lines.append(f"- DPO: {name.replace('kl', 'KL')} {verdict} as beta falls: {text}.")
    against = differences(points)
    for method in OTHERS:
        compared = [d for (name, _), d in against.items() if name == method and d]
        outside = sum(name == method for name, _ in against) - len(compared)
        if not compared:
            continue
        above, below = (sum(sign * d > 2 * e for d, e in compared) for sign in (1, -1))
        lines.append(
            f"- Against {method} at equal KL, DPO has more reward at {above} of {len(compared)} points by more than "
            f"two standard errors, less at {below}" + (f"; {outside} outside its range." if outside else ".")
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
        sweeps = sorted(settings) if method in SWEPT else [None]
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
