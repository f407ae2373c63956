"""The cost of a step against the number of completions of its prompts: linear in tokens, each counted once.

    python -m bench.group_sizes    # writes bench/results/groups.json and groups.png

The model, the trainer's side and the clock are those of `bench.bench_step`; prompts and completions have the lengths of
its mix `groups`, and a step holds two prompts with all pairs of their K completions, K from 2 to 8.
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from bench import report
from bench.timing import interleave
from bench.worker import Worker
from bench.workload import GROUPS, StepSettings, describe

COMPLETIONS = (2, 3, 4, 5, 6, 8)
PROMPTS = 2


class SizedWorker(Worker):
    """The trainer's side on prompts with so many completions each, under a name of its own."""

    def __init__(self, completions: int, settings: StepSettings, steps: int):
        self.mix = replace(GROUPS, completions=completions)
        self.settings = replace(settings, pairs_per_step=PROMPTS * self.mix.pairs_per_prompt)
        super().__init__("shared", self.settings, self.mix, steps)
        self.name = f"K={completions}"

    def tokens(self, steps: int) -> dict[str, float]:
        drawn = self.mix.draw(
            steps, self.settings.pairs_per_step, self.settings.model.vocabulary, self.settings.data_seed
        )
        return describe(drawn)


def measure(settings: StepSettings, steps: int, rounds: int) -> dict[str, Any]:
    """Seconds a step by K, the sides taking turns, and the line through them over unique tokens."""
    workers = [SizedWorker(completions, settings, steps) for completions in COMPLETIONS]
    try:
        timings, _ = interleave(workers, steps, rounds, warmup_steps=1)
        points = [
            {
                "completions": completions,
                "pairs": worker.settings.pairs_per_step,
                "seconds": timings[worker.name].minimum,
                "median_seconds": timings[worker.name].median,
                "peak_bytes": worker.ask("memory")["peak_bytes"],
                **worker.tokens(steps),
            }
            for completions, worker in zip(COMPLETIONS, workers, strict=True)
        ]
    finally:
        for worker in workers:
            worker.close()
    tokens, seconds = (np.array([point[name] for point in points]) for name in ("shared_tokens", "seconds"))
    slope, start = np.polyfit(tokens, seconds, 1)
    rest = seconds - (start + slope * tokens)
    return {
        "points": points,
        "seconds_a_token": float(slope),
        "seconds_at_no_token": float(start),
        "r_squared": float(1 - (rest**2).sum() / ((seconds - seconds.mean()) ** 2).sum()),
        "settings": settings.asdict(),
        "lengths": asdict(GROUPS),
        "environment": report.environment("python -m bench.group_sizes"),
    }


def draw(found: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    tokens, seconds = ([point[name] for point in found["points"]] for name in ("shared_tokens", "seconds"))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(tokens, seconds, "o", color="#0b6e99")
    ends = np.array([0.0, 1.05 * max(tokens)])
    left.plot(ends, found["seconds_at_no_token"] + found["seconds_a_token"] * ends, color="#0b6e99", lw=1)
    for point in found["points"]:
        place = (point["shared_tokens"], point["seconds"])
        left.annotate(f"K={point['completions']}", place, textcoords="offset points", xytext=(4, -11), fontsize=8)
    left.set(xlabel="unique tokens a step", ylabel="seconds a step", xlim=(0, None), ylim=(0, None))
    left.set_title(f"linear in unique tokens, R² = {found['r_squared']:.4f}", fontsize=10)
    sizes = [point["completions"] for point in found["points"]]
    right.plot(sizes, [point["pairs"] / point["seconds"] for point in found["points"]], "o-", color="#b3541e")
    right.set(xlabel="completions a prompt, K", ylabel="pairs a second", ylim=(0, None))
    right.set_title("all K (K - 1) / 2 pairs", fontsize=10)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    found = measure(StepSettings(dtype=options.dtype), options.steps, options.rounds)
    report.RESULTS.mkdir(parents=True, exist_ok=True)
    (report.RESULTS / "groups.json").write_text(json.dumps(found, indent=1) + "\n")
    draw(found, report.RESULTS / "groups.png")
    for point in found["points"]:
        print(
            f"K={point['completions']}: {point['shared_tokens']:.0f} unique tokens, {point['seconds']:.3f} s, "
            f"{point['pairs'] / point['seconds']:.2f} pairs/s"
        )
    print(
        f"{1e3 * found['seconds_a_token']:.3f} ms a token and {found['seconds_at_no_token']:.3f} s a step, "
        f"R² {found['r_squared']:.4f}"
    )


if __name__ == "__main__":
    main()
