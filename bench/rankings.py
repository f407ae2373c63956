"""Plackett-Luce, all pairs, or one pair a group? The three on the same groups of real reviews, in the same steps.

    python -m bench.rankings            # three seeds; writes bench/results/rankings.json and rankings.md
    python -m bench.rankings --quick    # tiny sizes: shows that it runs, measures nothing

A prompt is a movie, its completions are snippets of reviews: those that called it fresh are preferred to those that
called it rotten. A quarter of a million weights first learn to write reviews of both kinds (the reference); then `dpo
train --comparisons` learns the preference by each method, and `dpo score` asks the policies about movies that none of
them has seen. The learning rate of a method is the one that is best on the validation movies with the first seed; the
figures are those of the test movies. Everything finished is kept under --work, and a second call goes on from there.

S seeds, M movies.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging as transformers_logging

from bench.data import fetch_movies
from bench.data.download import CACHE, run_script, write_jsonl
from bench.paper.frontier import same_settings
from bench.report import RESULTS, environment
from dpo.checkpoint import save_model
from dpo.commands import ScoreConfig
from dpo.config import TrainConfig
from dpo.console import say
from dpo.data import load_preferences
from dpo.demo.model import build_model, train_tokenizer, warm_up
from dpo.durable import write_text
from dpo.load import eos_token_ids
from dpo.metrics import read_json_lines
from dpo.score import score
from dpo.train import train

METHODS = {"Plackett-Luce": "ranking", "all pairs": "all", "best against worst": "best-vs-worst"}
"""What is compared, and its --comparisons."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """Everything that a result depends on, beside the seed."""

    name: str = "full"
    movies: int | None = None
    """None: all."""
    validation: float = 0.15
    """Fraction of the movies that chooses the learning rates."""
    test: float = 0.25
    prompt_words: int = 32
    """Words of the plot behind the title."""
    most: int = 3
    """Fresh reviews of a group, and rotten ones: a ranking averages over the orders of up to three that are equal."""
    warm_up_epochs: int = 4
    epochs: int = 1
    groups_per_step: int = 16
    beta: float = 0.5
    warmup_steps: int = 10
    lrs: tuple[float, ...] = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)


FULL = Settings()
QUICK = replace(FULL, name="quick", movies=16, warm_up_epochs=1, groups_per_step=8, lrs=(3e-4, 1e-3))


def prompt_of(movie: Row, words: int) -> str:
    """The title, and how the plot begins."""
    plot = " ".join(movie["plot"].split()[:words])
    return f"{movie['title']}: {plot}\nA critic:"


def as_row(movie: Row, fresh: Sequence[str], rotten: Sequence[str], settings: Settings) -> Row:
    """A row of scored completions: 1 for fresh, 0 for rotten."""
    completions = [f" {text}" for text in (*fresh, *rotten)]
    scores = [1] * len(fresh) + [0] * len(rotten)
    return {"prompt": prompt_of(movie, settings.prompt_words), "completions": completions, "scores": scores}


def groups_of(movie: Row, settings: Settings, shuffle: random.Random) -> list[Row]:
    """The movie's reviews dealt out into groups with up to `settings.most` of either kind, one at least.

    No review is in two of them; what is left over of the more frequent kind is left out.
    """
    sides = [shuffle.sample(movie[kind], len(movie[kind])) for kind in fetch_movies.KINDS]
    fewer, more = sorted(map(len, sides))
    count = min(fewer, math.ceil(more / settings.most))
    dealt = [[side[k::count][: settings.most] for side in sides] for k in range(count)]
    return [as_row(movie, fresh, rotten, settings) for fresh, rotten in dealt]


def split(movies: Sequence[Row], settings: Settings) -> dict[str, list[Row]]:
    """Training, validation and test movies, the same for every seed."""
    order = random.Random(0).sample(list(movies), len(movies))[: settings.movies]
    first, second = (round(fraction * len(order)) for fraction in (settings.validation, settings.test))
    return {"validation": order[:first], "test": order[first : first + second], "train": order[first + second :]}


@dataclass(frozen=True)
class Measure:
    """Of each movie, [M] float64: pairs of a fresh and a rotten review that are in order, all such pairs, and whether a
    fresh review has the highest reward of all."""

    correct: Tensor
    pairs: Tensor
    best: Tensor


def measure(records: Sequence[Row]) -> Measure:
    """Counts what `dpo score` wrote about a file of movies; equal rewards count half."""
    held: dict[int, list[Row]] = {}
    for record in records:
        held.setdefault(record["row"], []).append(record)
    correct, best = [], []
    for found in held.values():
        correct.append(sum(0.5 * ((r["margin"] > 0) + (r["margin"] >= 0)) for r in found))
        lead = max(r["chosen_reward"] for r in found) - max(r["rejected_reward"] for r in found)
        best.append(0.5 * ((lead > 0) + (lead >= 0)))
    pairs = [len(found) for found in held.values()]
    return Measure(*(torch.tensor(values, dtype=torch.float64) for values in (correct, pairs, best)))


def estimate(counts: Tensor, weights: Tensor) -> tuple[float, float]:
    """The mean over seeds of sum(counts) / sum(weights), and its standard error.

    The error has two parts, added in squares: which movies were drawn (of a ratio of sums over movies), and the spread
    of the seeds.

    Args:
        counts: [S, M]. weights: [M].
    """
    by_seed = counts.sum(1) / weights.sum()
    movies, seeds = counts.shape[1], counts.shape[0]
    residuals = (counts.mean(0) - by_seed.mean() * weights) / weights.sum()
    drawn = residuals.square().sum() * movies / (movies - 1)
    spread = by_seed.var() / seeds if seeds > 1 else torch.zeros(())
    return by_seed.mean().item(), (drawn + spread).sqrt().item()


class Experiment:
    """One seed: the reference, the groups, and a policy for every method and learning rate."""

    def __init__(self, settings: Settings, seed: int, work: Path, movies: Sequence[Row]) -> None:
        self.settings, self.seed = settings, seed
        self.folder = work / settings.name / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        # a policy depends on its own learning rate only
        same_settings(self.folder / "settings.json", replace(settings, lrs=()))
        parts, shuffle = split(movies, settings), random.Random(seed)
        self.train = [row for movie in parts["train"] for row in groups_of(movie, settings, shuffle)]
        write_jsonl(self.folder / "train.jsonl", self.train)
        for part in ("validation", "test"):
            whole = (as_row(movie, movie["fresh"], movie["rotten"], settings) for movie in parts[part])
            write_jsonl(self.folder / f"{part}.jsonl", whole)
        self._make_base()

    def _make_base(self) -> None:
        """The reference: it learns to write reviews of both kinds, of the training movies only."""
        if (self.folder / "base" / "config.json").exists():
            return
        tokenizer = train_tokenizer(text for row in self.train for text in (row["prompt"], *row["completions"]))
        model = build_model(tokenizer, self.seed)
        groups = list(load_preferences(self.train, tokenizer, eos_token_ids=eos_token_ids(model, tokenizer)))
        loss = warm_up(model, groups, epochs=self.settings.warm_up_epochs, seed=self.seed)
        say(f"seed {self.seed}: {len(groups)} groups; the reference has {loss:.2f} nats per token")
        save_model(self.folder / "base", model, tokenizer)

    def measured(self, method: str, lr: float, part: str) -> Measure:
        """A policy on the validation or on the test movies; trained and scored unless that is there."""
        run = self.folder / f"{METHODS[method]}-{lr:g}"
        scores = run.with_name(f"{run.name}-{part}.jsonl")
        if not scores.exists():
            train(self.config(method, lr, run))
            base, data = str(self.folder / "base"), str(self.folder / f"{part}.jsonl")
            settings = {"reference": base, "data": data, "beta": self.settings.beta, "output": str(scores)}
            score(ScoreConfig(model=f"{run}/model", **settings))
        return measure(read_json_lines(scores))

    def config(self, method: str, lr: float, run: Path) -> TrainConfig:
        """The training as a user would configure it."""
        settings = self.settings
        return TrainConfig(
            model=str(self.folder / "base"),
            data=str(self.folder / "train.jsonl"),
            output=str(run),
            reference_cache=str(self.folder / "references"),
            comparisons=METHODS[method],  # pyright: ignore[reportArgumentType]
            reduction="prompts",
            groups_per_step=settings.groups_per_step,
            epochs=settings.epochs,
            beta=settings.beta,
            lr=lr,
            warmup_steps=settings.warmup_steps,
            seed=self.seed,
            resume="auto",
            log_every=1000,
            log_to=("none",),
        )


def choose(first: Experiment, method: str) -> tuple[float, Row]:
    """The learning rate that is best on the validation movies, and the accuracy and its error at every rate."""
    found: dict[float, tuple[float, float]] = {}
    for lr in first.settings.lrs:
        held = first.measured(method, lr, "validation")
        found[lr] = estimate(held.correct[None], held.pairs)
    return max(found, key=lambda lr: found[lr][0]), {f"{lr:g}": of for lr, of in found.items()}


def summarise(measures: Mapping[str, Sequence[Measure]]) -> dict[str, Row]:
    """Accuracy on the test movies by method, and what it is less that of all pairs on the same movies and seeds."""
    pairs = measures["all pairs"][0].pairs
    ones = torch.ones_like(pairs)
    correct = {name: torch.stack([m.correct for m in found]) for name, found in measures.items()}
    best = {name: torch.stack([m.best for m in found]) for name, found in measures.items()}
    rows: dict[str, Row] = {}
    for name in measures:
        rows[name] = {"accuracy": estimate(correct[name], pairs), "best": estimate(best[name], ones)}
        rows[name]["accuracy_by_seed"] = (correct[name].sum(1) / pairs.sum()).tolist()
        if name != "all pairs":
            rows[name]["accuracy_less_all_pairs"] = estimate(correct[name] - correct["all pairs"], pairs)
            rows[name]["best_less_all_pairs"] = estimate(best[name] - best["all pairs"], ones)
    return rows


def table(rows: Mapping[str, Row]) -> str:
    """The results in markdown."""
    lines = [
        "| `--comparisons` | learning rate | validation | pairs in order | less all pairs | a fresh review on top |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in rows.items():
        less = row.get("accuracy_less_all_pairs")
        cells = [f"`{METHODS[method]}`", f"{row['lr']:g}", _with_error(row["validation"][f"{row['lr']:g}"])]
        cells += [_with_error(row["accuracy"]), _with_error(less, "+") if less else "", _with_error(row["best"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _with_error(value: tuple[float, float], sign: str = "") -> str:
    return f"{value[0]:{sign}.3f} ± {value[1]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Plackett-Luce, all pairs and one pair a group on real reviews.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=CACHE / "rankings", help="folder of what is finished")
    parser.add_argument("--movies", type=Path, default=CACHE / "movies", help="folder of the reviews")
    parser.add_argument("--output", type=Path, help="folder of the table and the JSON file")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else FULL
    output = arguments.output or (RESULTS if settings is FULL else arguments.work / settings.name)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)  # products this small are slower on more
    fetch_movies.fetch(arguments.movies)
    movies = read_json_lines(arguments.movies / "movies.jsonl")
    experiments = [Experiment(settings, seed, arguments.work, movies) for seed in arguments.seeds]
    chosen = {method: choose(experiments[0], method) for method in METHODS}
    measures = {
        method: [experiment.measured(method, lr, "test") for experiment in experiments]
        for method, (lr, _) in chosen.items()
    }
    rows = summarise(measures)
    for method, (lr, validation) in chosen.items():
        rows[method] |= {"lr": lr, "validation": validation}
    pairs = measures["all pairs"][0].pairs
    about = environment("python -m bench.rankings") | {"seeds": arguments.seeds}
    about |= {"settings": dataclasses.asdict(settings), "results": rows}
    about |= {"training_groups": len(experiments[0].train), "test_movies": len(pairs), "test_pairs": int(pairs.sum())}
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "rankings.json", json.dumps(about, indent=1) + "\n")
    write_text(output / "rankings.md", table(rows))
    say(table(rows))


if __name__ == "__main__":
    run_script(main)
