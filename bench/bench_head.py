"""The LM head on CPU: each plan of linear_token_logps over the bare GEMMs it is made of, forward and backward.

    python -m pytest -q -s bench/bench_head.py                   # one thread, fp32 and bf16: the figures of README
    python -m bench.bench_head --threads 2 --dtype bfloat16 --rounds 9 --peers

N completion rows, H hidden, V vocabulary. A round runs every side once, in rotating order; minimum and median are over
rounds. "Bare" GEMMs write into buffers allocated beforehand, ours allocate their outputs and workspace in every round.
Nothing is timed before its gradients agree with float64.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dpo_kernels import choose_plan, linear_token_logps, reference
from torch import Tensor

GEMMS = {"frozen": 2, "retain": 3, "recompute": 4}


@dataclass(frozen=True)
class Settings:
    """One run."""

    rows: int = 512
    hidden: int = 512
    vocabulary: int = 32000
    dtype: str = "float32"
    """Of the GEMMs; bfloat16 runs ours under autocast with an fp32 weight."""
    threads: int = 1
    rounds: int = 9
    peers: bool = False


@dataclass(frozen=True)
class Problem:
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    grad: Tensor
    settings: Settings

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.settings.dtype)


def make_problem(settings: Settings) -> Problem:
    maker = torch.Generator().manual_seed(0)
    dtype = getattr(torch, settings.dtype)
    hidden = torch.randn(settings.rows, settings.hidden, generator=maker).to(dtype)
    weight = torch.randn(settings.vocabulary, settings.hidden, generator=maker) * settings.hidden**-0.5
    targets = torch.randint(settings.vocabulary, (settings.rows,), generator=maker)
    return Problem(hidden, weight, targets, torch.randn(settings.rows, generator=maker), settings)


def bare_gemms(problem: Problem, count: int) -> Callable[[], None]:
    """logits (twice if four), dH, and from three on dW: nothing else, into buffers that exist."""
    hidden, weight = problem.hidden, problem.weight.to(problem.dtype)
    logits = torch.zeros(hidden.shape[0], weight.shape[0], dtype=problem.dtype)
    grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)

    def run() -> None:
        for _ in range(2 if count == 4 else 1):
            torch.mm(hidden, weight.t(), out=logits)
        torch.mm(logits, weight, out=grad_hidden)
        if count > 2:
            torch.mm(logits.t(), hidden, out=grad_weight)

    return run


def ours(problem: Problem, plan: str) -> Callable[[], tuple[Tensor | None, Tensor | None]]:
    hidden = problem.hidden.clone().requires_grad_()
    weight = problem.weight.clone().requires_grad_(plan != "frozen")

    def run() -> tuple[Tensor | None, Tensor | None]:
        hidden.grad = weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=problem.dtype == torch.bfloat16):
            logps = linear_token_logps(hidden, weight, problem.targets, plan=plan)
        logps.backward(problem.grad)
        return hidden.grad, weight.grad

    return run


def peers(problem: Problem) -> dict[str, Callable[[], Any]]:
    """Eager torch, and cut-cross-entropy's CPU implementation where it is installed and compiles."""
    hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=problem.dtype == torch.bfloat16)

    def step(loss: Callable[[], Tensor]) -> tuple[Tensor | None, Tensor | None]:
        hidden.grad = weight.grad = None
        with autocast:
            value = loss()
        value.backward(-problem.grad)
        return hidden.grad, weight.grad

    def eager() -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), problem.targets, reduction="none")

    found: dict[str, Callable[[], Any]] = {"eager torch": lambda: step(eager)}
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError:
        return found

    def cce() -> Tensor:
        return linear_cross_entropy(hidden, weight, problem.targets, reduction="none", impl="torch_compile")

    try:
        step(cce)
    except Exception as error:
        print(f"cut-cross-entropy (torch_compile) does not run here: {type(error).__name__}: {str(error)[:200]}")
        return found
    return found | {"cut-cross-entropy (torch_compile)": lambda: step(cce)}


def check_gradients(problem: Problem, sides: dict[str, Callable[[], Any]]) -> None:
    """Every side that gives gradients, against float64."""
    hidden, weight = problem.hidden.double().requires_grad_(), problem.weight.double().requires_grad_()
    reference.linear_token_logps(hidden, weight, problem.targets).backward(problem.grad.double())
    tolerance = 1e-5 if problem.dtype == torch.float32 else 3e-2
    for name, side in sides.items():
        for found, truth in zip(side() or (), (hidden.grad, weight.grad), strict=False):
            if found is not None and truth is not None:
                error = ((found.double() - truth).norm() / truth.norm()).item()
                assert error < tolerance, f"{name}: gradient off by {error:.2e}, relative"


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of every side, minimum and median, and each plan's ratio to its bare GEMMs."""
    torch.set_num_threads(settings.threads)
    problem = make_problem(settings)
    sides: dict[str, Callable[[], Any]] = {f"{n} bare GEMMs": bare_gemms(problem, n) for n in (2, 3, 4)}
    sides |= {name: ours(problem, name) for name in GEMMS}
    if settings.peers:
        sides |= peers(problem)
    check_gradients(problem, sides)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for turn in range(settings.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            sides[name]()
            seconds[name].append(time.perf_counter() - start)
    least = {name: min(values) for name, values in seconds.items()}
    middle = {name: median(values) for name, values in seconds.items()}
    over = {plan: least[plan] / least[f"{n} bare GEMMs"] for plan, n in GEMMS.items()}
    over_median = {plan: middle[plan] / middle[f"{n} bare GEMMs"] for plan, n in GEMMS.items()}
    return {
        "settings": asdict(settings),
        "environment": {"torch": torch.__version__, "cpu": cpu_name(), "isa": torch.backends.cpu.get_cpu_capability()},
        "minimum_seconds": least,
        "median_seconds": middle,
        "over_bare_minimum": over,
        "over_bare_median": over_median,
        "plans": {name: describe_plan(problem, name) for name in GEMMS},
    }


def describe_plan(problem: Problem, plan: str) -> dict[str, Any]:
    settings = problem.settings
    return asdict(
        choose_plan(
            settings.rows, settings.vocabulary, settings.hidden, problem.dtype, plan != "frozen", None, plan=plan
        )
    )


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def table(found: dict[str, Any]) -> str:
    lines = [json.dumps(found["settings"]), json.dumps(found["environment"])]
    lines += [json.dumps(plan) for plan in found["plans"].values()]
    lines.append(f"{'':36}{'minimum':>10}{'median':>10}{'over bare':>11}{'(median)':>10}")
    for name, least in found["minimum_seconds"].items():
        over, over_median = found["over_bare_minimum"].get(name), found["over_bare_median"].get(name)
        ratio = f"{over:>11.3f}{over_median:>10.3f}" if over else ""
        lines.append(f"{name:36}{least * 1e3:>8.1f}ms{found['median_seconds'][name] * 1e3:>8.1f}ms{ratio}")
    return "\n".join(lines)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_head(benchmark, dtype, request):
    """Every plan's gradients are checked against float64, then timed."""
    settings = Settings(dtype=dtype, peers=True)
    if request.config.getoption("--quick"):
        settings = replace(settings, rows=24, hidden=32, vocabulary=500, rounds=2, peers=False)
    found = benchmark.pedantic(measure, args=(settings,), rounds=1, iterations=1)
    benchmark.extra_info.update(found)
    print("\n" + table(found))


def main() -> None:
    parser = argparse.ArgumentParser(description="The LM head's plans over bare GEMMs, on CPU.")
    for name, default in asdict(Settings()).items():
        if isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true")
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default)
    print(table(measure(Settings(**vars(parser.parse_args())))))


if __name__ == "__main__":
    main()
