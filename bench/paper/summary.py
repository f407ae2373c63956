"""Figure, table and JSON file of the frontier."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from fractions import Fraction
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
    "DPO, lower rate": "#93b4f5",
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
    write_text(output / "frontier.md", "\n".join(part for part in parts if part) + "\n")
    draw(merged, output / "frontier.png", about["seeds"])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def mean_over_seeds(values: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error: that of the samples, or the spread of the seeds where that is larger."""
    held = torch.tensor(values, dtype=torch.float64)
    error = math.hypot(*errors) / len(held)
    if len(held) > 1:
        error = max(error, held.std().item() / math.sqrt(len(held)))
    return held.mean().item(), error


def merge_seeds(points: Sequence[Point]) -> list[Point]:
    """The mean over seeds of every point, by method and KL, each with its standard error."""
    groups: dict[tuple[str, str, Fraction], list[Point]] = {}
    for point in points:
        groups.setdefault((point["method"], point["setting"], _count(point, points)), []).append(point)
    merged = []
    for (method, setting, count), held in groups.items():
        label = f"N = {count}" if method == "Best-of-N" else setting
        if method in SWEPT:
            label += ", all steps" if count == 1 else f", {count} of the steps"
        point: Point = {"method": method, "setting": setting, "label": label, "count": float(count), "seeds": len(held)}
        for name in ("kl", "reward"):
            mean, error = mean_over_seeds([p[name] for p in held], [p[f"{name}_se"] for p in held])
            point |= {name: mean, f"{name}_se": error}
        if all("tokens" in p for p in held):
            point["tokens"] = sum(p["tokens"] for p in held) / len(held)
        merged.append(point)
    order = ["reference", *COLOURS]
    return sorted(
        merged, key=lambda p: (order.index(p["method"]), p["setting"] if p["method"] in SWEPT else "", p["kl"])
    )


def _count(point: Point, points: Sequence[Point]) -> Fraction:
    """N of Best-of-N; of others the share of a run's steps, in eighths at the finest: seeds differ by a step or so."""
    if point["method"] == "Best-of-N":
        return Fraction(point["n"])
    steps = [p["steps"] for p in points if all(p[k] == point[k] for k in ("method", "setting", "seed"))]
    return Fraction(point["steps"], max(*steps, 1)).limit_denominator(8)


def frontier(merged: Sequence[Point], method: str) -> list[Point]:
    """The reference and the points of a method, by KL."""
    return sorted((p for p in merged if p["method"] in ("reference", method)), key=lambda p: p["kl"])


def at_the_end(curve: Sequence[Point]) -> list[Point]:
    """A curve without the points that were measured on the way."""
    return [p for p in curve if p["method"] not in SWEPT or p["count"] == 1]


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
    """Reward of every method at the divergences of EQUAL_KL; of a method swept by steps, along the ends of its runs."""

    def of_one(merged: list[Point]) -> dict[Any, Estimate | None]:
        found = {}
        for method in COLOURS:
            curve = at_the_end(frontier(merged, method))
            found |= {(method, kl): reward_at(curve, kl) for kl in EQUAL_KL}
        return found

    return over_seeds(points, of_one)


def table(merged: Sequence[Point], against: Mapping[tuple[str, str], Estimate | None]) -> str:
    """All points, each with its mean length, beside DPO's frontier at the same KL."""
    lines = ["| method | setting | KL | reward | tokens | DPO at this KL, less this |", "|---|---|---|---|---|---|"]
    for p in merged:
        found = against.get((p["method"], p["label"]))
        shown = f"{found[0]:+.3f} ± {found[1]:.3f}" if found else ""
        kl, reward = (f"{p[name]:.{d}f} ± {p[name + '_se']:.{d}f}" for name, d in (("kl", 2), ("reward", 3)))
        tokens = f"{p['tokens']:.1f}" if "tokens" in p else ""
        lines.append(f"| {p['method']} | {p['label']} | {kl} | {reward} | {tokens} | {shown} |")
    return "\n".join(lines) + "\n"


def equal_kl_table(rewards: Mapping[tuple[str, float], Estimate | None]) -> str:
    """The rewards of `at_equal_kl`, a row a method; empty where a method does not reach."""
    if not any(rewards.values()):
        return ""
    lines = ["| reward at KL | " + " | ".join(f"{kl:g}" for kl in EQUAL_KL) + " |", "|---" * (len(EQUAL_KL) + 1) + "|"]
    for method in COLOURS:
        found = [rewards.get((method, kl)) for kl in EQUAL_KL]
        if any(found):
            cells = (f"{value[0]:.3f} ± {value[1]:.3f}" if value else "" for value in found)
            lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def rises(points: Sequence[Point]) -> dict[str, list[Estimate]]:
    """By how much DPO's KL and reward rise from each beta to the next smaller one."""

    def of_one(merged: list[Point]) -> dict[Any, Estimate | None]:
        betas = sorted((p for p in merged if p["method"] == "DPO"), key=lambda p: -float(p["setting"].split()[1]))
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
    """Reward against KL, a curve a method, two standard errors on either side.

    The axis is that of the root of KL, with which reward grows at best where KL is small. Methods swept by steps are
    joined at the end of their runs; what was measured on the way is unjoined.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    bars: dict[str, Any] = {"marker": "o", "markersize": 3, "elinewidth": 0.8}
    for method, colour in COLOURS.items():
        held = at_the_end(frontier(merged, method))
        if any(p["method"] == method for p in held):
            style: dict[str, Any] = {"linestyle": "--" if method == "Best-of-N" else "-", "label": method}
            axis.errorbar(*_errorbars(held), linewidth=2.2 if method == "DPO" else 1.2, color=colour, **style, **bars)
        rest = [p for p in merged if p["method"] == method and p not in held]
        if rest:
            axis.errorbar(*_errorbars(rest), linestyle="none", color=colour, alpha=0.35, **bars)
    most = max(p["kl"] for p in merged)
    axis.set_xscale("function", functions=(lambda x: x.clip(min=0) ** 0.5, lambda x: x**2))
    axis.set_xlim(0, 1.05 * max(most, 0.1))
    axis.set_xticks([tick for tick in (0, 0.25, 1, 2, 4, 8, 16, 32) if tick <= 1.05 * most])
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("KL of policy and reference, nats per completion (root scale)")
    axis.set_ylabel("reward (VADER compound)")
    number = f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    axis.set_title(f"reward against KL on held-out prompts, {number}; bars: two standard errors", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=120)


def _errorbars(points: Sequence[Point]) -> list[list[float]]:
    """x, y, and two standard errors of y and of x."""
    columns = ("kl", 1), ("reward", 1), ("reward_se", 2), ("kl_se", 2)
    return [[times * p[name] for p in points] for name, times in columns]
