"""Results as JSON and as a markdown table, with everything needed to repeat them."""

import datetime
import json
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "numpy")
TARGETS = {
    ("summarise", "fp32"): (6.0, 2.4),
    ("chat", "fp32"): (3.5, 1.8),
    ("summarise", "bf16"): (9.0, 2.2),
    ("chat", "bf16"): (4.5, 1.8),
    ("groups", "fp32"): (8.0, 3.2),
    ("groups", "bf16"): (14.0, 3.2),
}
"""What we aim at: pairs a second over TRL's, and over --padded's."""
MEMORY_TARGET, FLOOR_TARGET = 0.4, 1.35


def environment(command: str) -> dict[str, Any]:
    """Command, commit, date, versions and processor."""
    return {
        "command": command,
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "-uno") else ""),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
    }


def _git(*arguments: str) -> str:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=here, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    fields = [line.split(":", 1) for line in info.read_text().splitlines() if ":" in line]
    first = {key.strip(): value.strip() for key, value in reversed(fields)}
    numbers = [f"{name} {first[name]}" for name in ("cpu family", "model") if name in first]
    return ", ".join([first.get("model name", platform.processor()), *numbers])


def ratios(sides: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """How `shared` stands to the others: times by the minimum and by the median, peak memory, time over the floor.
    Without it, how the patched TRL stands to them."""
    ours, found = sides.get("shared") or sides.get("trl-shared") or sides.get("trl-patched"), {}
    if ours is None:
        return found
    for other in ("trl", "padded"):
        if other in sides:
            found[f"speed over {other} (minimum)"] = sides[other]["minimum_seconds"] / ours["minimum_seconds"]
            found[f"speed over {other} (median)"] = sides[other]["median_seconds"] / ours["median_seconds"]
            found[f"peak memory of {other}'s"] = ours["peak_bytes"] / sides[other]["peak_bytes"]
            grown = [s["peak_bytes"] - s["resident_bytes_before_steps"] for s in (ours, sides[other])]
            found[f"memory added by steps, of {other}'s"] = grown[0] / max(1, grown[1])
    if "floor" in sides:
        found["time over the floor (minimum)"] = ours["minimum_seconds"] / sides["floor"]["minimum_seconds"]
        found["time over the floor (median)"] = ours["median_seconds"] / sides["floor"]["median_seconds"]
    return found


def save(cell: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write one cell's JSON, then the table of all cells that the folder holds."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{cell['mix']}-{_kind(cell['settings'])}.json"
    path.write_text(json.dumps(cell, indent=1) + "\n")
    cells = [json.loads(found.read_text()) for found in sorted(folder.glob("step-*.json"))]
    (folder / "step.md").write_text("\n".join(_document(cells)) + "\n")
    return path


def _kind(settings: Mapping[str, Any]) -> str:
    clock = "" if settings["clock"] == "wall" else f"-{settings['clock']}-time"
    products = "" if settings.get("products", "fastest") == "fastest" else f"-{settings['products']}-products"
    return f"{settings['dtype']}-{settings['optimizer']}{clock}{products}"


def _document(cells: list[dict[str, Any]]) -> list[str]:
    lines = [
        "# One training step, measured",
        "",
        "Written by `python -m bench.bench_step`; what is compared and how is in `bench/README.md`. Seconds and pairs",
        "a second are the minimum over rounds of each step, averaged over the steps (in brackets: the median).",
        "",
        "| lengths | dtype | optimizer | products | side | s a step | pairs/s | peak memory, MiB"
        " | before the steps, MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells:
        settings = cell["settings"]
        for name, side in cell["sides"].items():
            pairs = settings["pairs_per_step"] / side["minimum_seconds"]
            median_pairs = settings["pairs_per_step"] / side["median_seconds"]
            memory = [] if name == "floor" else [side["peak_bytes"], side["resident_bytes_before_steps"]]
            columns = [
                cell["mix"],
                settings["dtype"],
                settings["optimizer"],
                settings.get("products", "fastest"),
                name,
                f"{side['minimum_seconds']:.3f} ({side['median_seconds']:.3f})",
                f"{pairs:.2f} ({median_pairs:.2f})",
                *([f"{m / 2**20:.0f}" for m in memory] or ["", ""]),
            ]
            lines.append("| " + " | ".join(columns) + " |")
    for cell in cells:
        lines += ["", *_details(cell)]
    return lines


def _details(cell: Mapping[str, Any]) -> list[str]:
    settings, known = cell["settings"], cell["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in known["packages"].items())
    lines = [
        f"## {cell['mix']}, {_kind(settings).replace('-', ', ')}",
        "",
        f"`{known['command']}`, commit {known['commit']}, {known['date']}, {known['cpu']},",
        f"{settings['threads']} threads, {settings['clock']} time, Python {known['python']}, {versions}.",
        f"Tokens a step: {_tokens(cell['tokens'])}{_of_mix(cell)}.",
        *([cell["note"]] if cell.get("note") else []),
        "",
        "| ratio | measured | aim |",
        "|---|---|---|",
    ]
    for name, value in cell["ratios"].items():
        lines.append(f"| {name} | {value:.2f} | {_aim(cell, name)} |")
    if "floor" in cell["sides"] and "profile" in cell:
        lines += ["", *_breakdown(cell)]
    return lines


def _of_mix(cell: Mapping[str, Any]) -> str:
    return f" (the whole mix: {_tokens(cell['tokens_of_mix'])})" if "tokens_of_mix" in cell else ""


def _tokens(counts: Mapping[str, float]) -> str:
    return ", ".join(f"{name.removesuffix('_tokens')} {count:.0f}" for name, count in counts.items())


def _aim(cell: Mapping[str, Any], name: str) -> str:
    over_trl, over_padded = TARGETS.get((cell["mix"], cell["settings"]["dtype"]), (None, None))
    aims = {"speed over trl": over_trl, "speed over padded": over_padded}
    for start, aim in aims.items():
        if name.startswith(start) and aim:
            return f">= {aim}"
    if name == "peak memory of trl's":
        return f"<= {MEMORY_TARGET}"
    return f"<= {FLOOR_TARGET}" if name.startswith("time over the floor") else ""


def _breakdown(cell: Mapping[str, Any]) -> list[str]:
    """The floor's parts, and a profiled step's components beside the part of the floor that they contain."""
    floor, profiled = cell["sides"]["floor"]["components"], cell["profile"]["components"]
    products = sum(v for k, v in floor.items() if k.startswith(("trunk", "head")))
    below = {
        "matrix products": products,
        "attention kernel": floor.get("attention products", 0.0),
        "optimizer update": floor.get("optimizer traffic", 0.0),
    }
    lines = ["Floor, mean of the steps: " + ", ".join(f"{k} {1e3 * v:.0f} ms" for k, v in floor.items()) + ".", ""]
    lines += [
        "One profiled step (the profiler slows it), components by self time:",
        "",
        "| component | ms | floor, ms | above, ms |",
        "|---|---|---|---|",
    ]
    for name, seconds in sorted(profiled.items(), key=lambda item: -item[1]):
        under = below.get(name, 0.0)
        lines.append(f"| {name} | {1e3 * seconds:.0f} | {1e3 * under:.0f} | {1e3 * (seconds - under):.0f} |")
    return lines


def show(cell: Mapping[str, Any]) -> str:
    """The cell for a terminal."""
    parts = [f"{cell['mix']} {cell['settings']['dtype']} {cell['settings']['optimizer']}"]
    for name, side in cell["sides"].items():
        pairs = cell["settings"]["pairs_per_step"] / side["minimum_seconds"]
        memory = "" if name == "floor" else f", peak {side['peak_bytes'] / 2**20:.0f} MiB"
        parts.append(
            f"  {name:7s} minimum {side['minimum_seconds']:.3f} s, median {side['median_seconds']:.3f} s,"
            f" {pairs:.2f} pairs/s{memory}"
        )
    parts += [f"  {name}: {value:.2f}" for name, value in cell["ratios"].items()]
    parts += [f"  configuration of {name}: {json.dumps(s['configuration'])}" for name, s in cell["sides"].items()]
    return "\n".join(parts)


def command_line() -> str:
    """The command as a reader would type it."""
    return "python -m bench.bench_step " + " ".join(sys.argv[1:])
