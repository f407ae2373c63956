"""One training step: this trainer, its padded mode, TRL's DPOTrainer, and the floor under all of them.

    python -m bench.bench_step --full                         # every cell, into bench/results/
    python -m bench.bench_step --mix chat --dtype fp32        # one cell
    python -m pytest -q bench/bench_step.py --benchmark-only  # the same through pytest-benchmark (--quick: seconds)

Every side runs in a process of its own, on the same token ids from the same weights; sides take turns step by step.
No time is reported unless the losses of all sides agree.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean
from typing import Any

import pytest

from bench import report
from bench.timing import interleave
from bench.worker import EXTRA_SIDES, SIDES, Worker
from bench.workload import MIXES, TINY_MIXES, TINY_MODEL, LengthMix, StepSettings, describe

LOSS_TOLERANCE = {"fp32": 2e-3, "bf16": 3e-2}
"""Between sides, after the first updates. Layouts round differently, and RMSprop's first steps amplify it."""


@dataclass(frozen=True)
class Effort:
    """How much is measured."""

    steps: int = 4
    """Different steps, each with pairs of its own."""
    rounds: int = 3
    """Times that every side runs every step."""
    warmup_steps: int = 2


FULL, QUICK = Effort(), Effort(steps=2, rounds=2, warmup_steps=1)


def measure(
    mix: LengthMix,
    settings: StepSettings,
    effort: Effort,
    sides: Sequence[str] = SIDES,
    note: str = "",
) -> dict[str, Any]:
    """Time all sides on one length mix; everything that goes into the results file."""
    workers = [Worker(name, settings, mix, effort.steps) for name in sides]
    try:
        timings, answers = interleave(workers, effort.steps, effort.rounds, warmup_steps=effort.warmup_steps)
        check_losses(answers, settings.dtype)
        found: dict[str, Any] = {}
        for worker in workers:
            times = timings[worker.name]
            found[worker.name] = {
                "minimum_seconds": times.minimum,
                "median_seconds": times.median,
                "seconds": times.seconds,
                "peak_bytes": worker.ask("memory")["peak_bytes"],
                "resident_bytes_before_steps": worker.resident_before_steps,
                "configuration": worker.configuration,
            }
            if worker.name == "floor":
                parts = [answer["components"] for answer in answers["floor"]]
                found["floor"]["components"] = {name: mean(part[name] for part in parts) for name in parts[0]}
                found["floor"]["gemm_operations"] = mean(answer["gemm_operations"] for answer in answers["floor"])
            else:
                found[worker.name]["losses"] = answers[worker.name]
        cell: dict[str, Any] = {"mix": mix.name, "lengths": asdict(mix), "settings": settings.asdict()}
        profiled = [worker.ask("profile 0") for worker in workers if worker.name == "shared"]
    finally:
        for worker in workers:
            worker.close()
    drawing = (settings.pairs_per_step, settings.model.vocabulary, settings.data_seed)
    tokens = {"tokens": describe(mix.draw(effort.steps, *drawing)), "tokens_of_mix": describe(mix.population(*drawing))}
    cell |= {"effort": asdict(effort), **tokens, "sides": found, "note": note}
    if profiled:
        cell["profile"] = profiled[0]
    return cell | {"ratios": report.ratios(found), "environment": report.environment(report.command_line())}


def check_losses(answers: dict[str, list[Any]], dtype: str) -> None:
    """All sides start at ln 2 and go through the same losses, or nothing is reported."""
    trained = {name: losses for name, losses in answers.items() if name != "floor"}
    for name, losses in trained.items():
        if not math.isclose(losses[0], math.log(2), abs_tol=LOSS_TOLERANCE[dtype]):
            raise RuntimeError(f"{name}: the first step's loss is {losses[0]}, not ln 2")
    for index, losses in enumerate(zip(*trained.values(), strict=True)):
        if max(losses) - min(losses) > LOSS_TOLERANCE[dtype]:
            raise RuntimeError(f"losses of step {index} differ: {dict(zip(trained, losses, strict=True))}")


def settings_of(mix: str, **settings: Any) -> StepSettings:
    return StepSettings(pairs_per_step=MIXES[mix].pairs_per_step, **settings)


class ReplayClock:
    """Feeds measured seconds to pytest-benchmark, which times one function at a time and cannot take turns itself."""

    def __init__(self) -> None:
        self.now, self._pending = 0.0, iter(())

    def load(self, seconds: Sequence[float]) -> None:
        self._pending = iter(seconds)

    def advance(self) -> None:
        self.now += next(self._pending)

    def __call__(self) -> float:
        return self.now


REPLAY = ReplayClock()
CELLS = [(mix, dtype) for dtype in ("fp32", "bf16") for mix in MIXES]
QUICK_CELLS = [("summarise", "fp32"), ("chat", "bf16"), ("groups", "fp32")]


@pytest.fixture(scope="session")
def cell(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One cell, measured once for all of its sides."""
    pytest.importorskip("trl", reason="the peers extra is not installed")
    mix, dtype = request.param
    if request.config.getoption("--quick"):
        if (mix, dtype) not in QUICK_CELLS:
            pytest.skip("left out by --quick")
        return measure(TINY_MIXES[mix], settings_of(mix, model=TINY_MODEL, dtype=dtype), QUICK)
    return measure(MIXES[mix], settings_of(mix, dtype=dtype), FULL)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cell", CELLS, indirect=True, ids="-".join, scope="session")
@pytest.mark.benchmark(timer=REPLAY, warmup=False)
def test_step(benchmark: Any, cell: dict[str, Any], side: str) -> None:
    found = cell["sides"][side]
    seconds = [second for rounds in found["seconds"] for second in rounds]
    benchmark.group = f"{cell['mix']} {cell['settings']['dtype']}"
    benchmark.extra_info.update(
        {key: value for key, value in found.items() if key != "seconds"}, settings=cell["settings"]
    )
    REPLAY.load(seconds)
    benchmark.pedantic(REPLAY.advance, rounds=len(seconds), iterations=1)
    if side == SIDES[-1]:
        print("\n" + report.show(cell))
    assert all(second > 0 for second in seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every length mix and dtype")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing written")
    parser.add_argument("--mix", choices=MIXES, default="summarise")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--optimizer", choices=("rmsprop", "adamw"), default="rmsprop")
    parser.add_argument("--sides", nargs="+", choices=(*SIDES, *EXTRA_SIDES), default=SIDES)
    parser.add_argument("--steps", type=int, default=FULL.steps)
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu, one thread: for a busy machine")
    parser.add_argument("--products", choices=("fastest", "torch"), default="fastest", help="routine of fp32 products")
    parser.add_argument("--note", default="", help="a sentence for the results, such as what else the machine did")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    effort = replace(FULL, steps=options.steps, rounds=options.rounds)
    for mix, dtype in CELLS if options.full else [(options.mix, options.dtype)]:
        named = {name: getattr(options, name) for name in ("optimizer", "threads", "clock", "products")}
        settings = settings_of(mix, dtype=dtype, **named)
        if options.quick:
            settings = replace(settings, model=TINY_MODEL)
            found = measure(TINY_MIXES[mix], settings, QUICK, options.sides)
        else:
            found = measure(MIXES[mix], settings, effort, options.sides, options.note)
        print(report.show(found), flush=True)
        if not (options.quick or options.no_save) and set(options.sides) == set(SIDES):
            print(f"written: {report.save(found)}")


if __name__ == "__main__":
    main()
