"""The LM head on CPU: our plans over the bare GEMMs they are made of, and peers on the same work.

    python -m pytest -q -s bench/bench_head.py          # one thread, fp32 and bf16, every peer that is installed
    python -m bench.bench_head --dtype bfloat16 --rounds 9 --peers --save

A round runs every side once, in rotating order; minimum and median are over rounds, at least 7. Sides allocate their
outputs and workspace in every round, "bare" GEMMs write into buffers that exist. Nothing is timed before its gradients
agree with float64. `head_sides.py` has the sides; --save writes `bench/results/head.md` and `head-DTYPE.json`.
"""

import argparse
import json
import subprocess
import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from dpo_kernels import choose_plan, reference
from torch import Tensor

from bench.head_sides import OURS, WITH_REFERENCE, Problem, Settings, Side, make_problem, sides_of
from bench.memory import allocated_peak

RESULTS = Path(__file__).parent / "results"
LIMITS = {"frozen": 1.15, "retain": 1.08, "recompute": 1.12}
"""Aims in fp32: times the plan's bare GEMMs. In bf16 our side also casts the fp32 weight and widens every tile."""
PACKAGES = ("torch", "trl", "liger-kernel", "cut-cross-entropy")


def true_gradients(problem: Problem, *, dpo: bool) -> tuple[Tensor, Tensor]:
    """float64 gradients of completion rows' hidden and of the weight: from dL/dlp, or of the DPO loss."""
    hidden, targets = problem.completion()
    hidden, weight = hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    if dpo:
        count = problem.settings.sequences
        ids = torch.arange(count).repeat_interleave(problem.settings.rows // count)
        ref = reference.linear_token_logps(hidden.detach(), problem.reference.double(), targets)
        pairs = torch.arange(count).chunk(2)
        reference.linear_dpo_loss(hidden, weight, targets, ids, ref, *pairs, num_completions=count)[0].backward()
    else:
        reference.linear_token_logps(hidden, weight, targets).backward(problem.grad.double())
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def check_gradients(problem: Problem, sides: dict[str, Side]) -> dict[str, float]:
    """Each side's relative error of its gradients against float64, the larger of the two; too large is a failure."""
    truths = {dpo: true_gradients(problem, dpo=dpo) for dpo in (False, True)}
    tolerance = 1e-4 if problem.dtype == torch.float32 else 3e-2
    errors: dict[str, float] = {}
    for name, side in sides.items():
        for found, truth in zip(side() or (), truths["reference" in name], strict=False):
            if found is not None:
                error = ((found.double() - truth).norm() / truth.norm()).item()
                errors[name] = max(error, errors.get(name, 0.0))
                assert error < tolerance, f"{name}: gradient off by {error:.2e}, relative"
    return errors


def interleaved(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Seconds by side and round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds, bytes and errors of every side, and each plan's ratio to its bare GEMMs."""
    torch.set_num_threads(settings.threads)
    problem = make_problem(settings)
    sides, missing = sides_of(problem)
    errors = check_gradients(problem, sides)
    peaks = {name: allocated_peak(side) for name, side in sides.items() if name in errors}
    seconds = interleaved(sides, settings.rounds)
    least = {name: min(values) for name, values in seconds.items()}
    middle = {name: median(values) for name, values in seconds.items()}
    kinds = {"over_bare": "", "over_torch_mm": ", torch.mm"}
    return {
        "settings": asdict(settings),
        "environment": environment(),
        "minimum_seconds": least,
        "median_seconds": middle,
        **{
            key: {plan: least[f"ours, {plan}"] / least[f"{n} bare GEMMs{suffix}"] for plan, n in OURS.items()}
            for key, suffix in kinds.items()
        },
        "gradient_error": errors,
        "peak_bytes": peaks,
        "not_run": missing,
        "plans": {name: describe_plan(problem, name) for name in OURS},
    }


def describe_plan(problem: Problem, plan: str) -> dict[str, Any]:
    settings, trained = problem.settings, plan != "frozen"
    size = settings.rows, settings.vocabulary, settings.hidden
    lender = torch.float32 if trained else None
    return asdict(choose_plan(*size, problem.dtype, trained, None, plan=plan, weight_grad_dtype=lender))


def environment() -> dict[str, Any]:
    versions: dict[str, Any] = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"cpu": cpu_name(), "isa": torch.backends.cpu.get_cpu_capability(), **versions}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


def table(found: dict[str, Any]) -> str:
    """Markdown: a row a side."""
    lines = ["| side | s, minimum | median | over bare GEMMs | aim | over torch.mm | peak, MiB | gradient error |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for name, least in found["minimum_seconds"].items():
        plan = name.removeprefix("ours, ")
        over = [found[key].get(plan) for key in ("over_bare", "over_torch_mm")]
        cells = [f"{least:.3f}", f"{found['median_seconds'][name]:.3f}"]
        aim = f"<= {LIMITS[plan]}" if over[0] and found["settings"]["dtype"] == "float32" else ""
        cells += [f"{over[0]:.3f}", aim, f"{over[1]:.3f}"] if over[0] else ["", "", ""]
        peak, error = found["peak_bytes"].get(name), found["gradient_error"].get(name)
        cells += [f"{peak / 2**20:.0f}" if peak is not None else "", f"{error:.1e}" if error is not None else ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [f"- {name} did not run: {why}" for name, why in found["not_run"].items()]
    return "\n".join(lines)


def save(found: dict[str, Any], command: str) -> None:
    """The run as JSON, and the tables of all saved runs."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    found = found | {"command": command, "commit": commit.stdout.strip() or "unknown", "date": date}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"head-{found['settings']['dtype']}.json").write_text(json.dumps(found, indent=1) + "\n")
    write_tables()


def write_tables() -> None:
    """`head.md` from the saved runs."""
    parts = [HEADER]
    for file in sorted(RESULTS.glob("head-*.json")):
        run = json.loads(file.read_text())
        s, e = run["settings"], run["environment"]
        parts.append(
            f"## {s['dtype']}\n\n`{run['command']}`, commit {run['commit']}, {run['date']},\n{e['cpu']} ({e['isa']}), "
            f"threads: {s['threads']}, minimum and median of {s['rounds']} interleaved rounds.\n"
            f"{s['rows']} completion rows of {s['tokens']} tokens, H {s['hidden']}, V {s['vocabulary']}. "
            + ", ".join(f"{name} {e[name]}" for name in PACKAGES)
            + f".\n\n{table(run)}\n"
        )
    (RESULTS / "head.md").write_text("\n".join(parts))


HEADER = f"""# The LM head on CPU, measured

Written by `python -m bench.bench_head --save`; the sides are in `bench/head_sides.py`. "Bare GEMMs" are the plan's
matrix products and nothing else, each by the faster of torch.mm and oneDNN; the column after the aim takes torch.mm for
all.

Peak is what a forward and backward allocates above what was there, its outputs included. The gradient error is
relative, against float64. "{WITH_REFERENCE}" is what Liger's loss computes: a reference forward, loss
and gradients. Liger and TRL as shipped compute every row, prompts and padding too; the others completion rows.
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head(benchmark, dtype, request):
    """Every side's gradients are checked against float64, then timed."""
    settings = Settings(dtype=dtype, peers=True)
    if request.config.getoption("--quick"):
        tiny = {"rows": 24, "tokens": 40, "sequences": 4, "hidden": 32, "vocabulary": 500, "rounds": 2}
        settings = replace(settings, **tiny, peers=False)
    found = benchmark.pedantic(measure, args=(settings,), rounds=1, iterations=1)
    benchmark.extra_info.update(found)
    print("\n" + table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="The LM head's plans over bare GEMMs, and peers, on CPU.")
    for name, default in asdict(Settings()).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--save", action="store_true", help="write bench/results/head.md and its JSON")
    given = vars(parser.parse_args())
    keep = given.pop("save")
    found = measure(Settings(**given))
    print(table(found))
    if keep:
        flags = [f"--{name} {value}" for name, value in given.items() if value != getattr(Settings(), name)]
        save(found, " ".join(["python -m bench.bench_head", *(flag.removesuffix(" True") for flag in flags), "--save"]))


if __name__ == "__main__":
    main()
