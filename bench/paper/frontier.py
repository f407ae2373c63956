"""The paper's frontier (Figure 2, left) on a laptop: reward against KL to the reference, for every method.

    python -m bench.paper.frontier                  # one seed
    python -m bench.paper.frontier --seeds 0 1 2    # the slow mode
    python -m bench.paper.frontier --smollm2        # a pretrained chat model as the reference: hours
    python -m bench.paper.frontier --quick          # tiny sizes: shows that it runs, measures nothing

Review snippets -> a Llama of a million weights, fine-tuned on them: the reference -> four samples a prompt, scored by
VADER (the ground truth) -> policies by every method -> fresh samples on held-out prompts: reward and KL. Everything
finished is kept under --work, and a second call goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.util
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from bench.data import fetch_smollm2, fetch_snippets
from bench.data.download import CACHE, run_script
from bench.paper import language, preferences, sampling
from bench.paper.rl import train_rloo
from bench.paper.settings import FULL, QUICK, QUICK_SMOLLM2, SMOLLM2, Run, Settings, runs
from bench.paper.summary import write_results
from dpo.checkpoint import write_text
from dpo.console import notice, say
from dpo.errors import UserError

Point = dict[str, Any]


class Experiment:
    """One seed: reference, preferences, and the points measured so far."""

    def __init__(self, settings: Settings, seed: int, work: Path, snippets: Path) -> None:
        self.settings, self.seed = settings, seed
        self.folder = work / settings.name / f"seed-{seed}"
        (self.folder / "points").mkdir(parents=True, exist_ok=True)
        same_settings(self.folder / "settings.json", settings)
        self.reward = fetch_snippets.load_scorer(snippets)
        texts = language.load_texts(snippets / "snippets.jsonl", settings, seed)
        known, unknown = texts[: settings.snippets], texts[settings.snippets :]
        self.base_folder = CACHE / settings.model if settings.model else self.folder / "base"
        self.base, self.tokenizer = language.fine_tune(self.base_folder, known, settings, seed)
        self.prompts = language.beginnings(known, self.tokenizer, settings.prompts, settings)
        self.held_out = language.beginnings(unknown, self.tokenizer, settings.held_out, settings)
        self._trainer: preferences.Trainer | None = None

    @property
    def trainer(self) -> preferences.Trainer:
        """Made when a method is first trained: it samples the reference and caches its log-probs."""
        if self._trainer is None:
            path, length = self.folder / "samples.pt", self.prompts.shape[1]
            held = self.base, self.tokenizer, self.reward, self.prompts, self.settings, self.seed
            rows, rewards = preferences.load_samples(path, *held)
            groups = preferences.compare(rows, rewards, length, self.base.config.eos_token_id)
            pairs = sum(len(group.pairs) for group in groups)
            say(f"{len(groups)} prompts with {pairs} pairs; mean reward {rewards.mean():.3f}")
            self._trainer = preferences.Trainer(self.base, groups, self.settings, self.seed)
        return self._trainer

    def measure(self, policy: Any) -> dict[str, float]:
        """A policy's rewards and KL on the held-out prompts; the same random numbers for every policy."""
        settings = self.settings
        numbers = settings.samples, settings.max_new_tokens, 10_000 + self.seed
        return sampling.measure(policy, self.base, self.tokenizer, self.reward, self.held_out, *numbers).as_dict()

    def once(self, method: str, setting: str, compute: Callable[[], Iterator[Point]]) -> None:
        """Computes and keeps the points of one method and setting, unless they are kept already."""
        path = self.folder / "points" / f"{method} {setting}.json".replace(" ", "-").lower()
        if path.exists():
            return
        wall, processor = time.perf_counter(), time.process_time()
        points = [{"method": method, "setting": setting, "seed": self.seed, **point} for point in compute()]
        seconds = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
        write_text(path, json.dumps([point | seconds for point in points], indent=1))
        for point in points:
            say(f"{method} {setting}: reward {point['reward']:.3f} at KL {point['kl']:.2f}, {seconds['seconds']:.0f} s")

    def reference(self) -> Iterator[Point]:
        yield {"steps": 0, **self.measure(copy.deepcopy(self.base))}

    def trained(self, run: Run) -> Iterator[Point]:
        for steps, policy in self.trainer.policies(run):
            yield {"steps": steps, **self.measure(policy)}

    def best_of(self) -> Iterator[Point]:
        most = max(self.settings.best_of)
        prompts = self.held_out.repeat_interleave(most, 0)
        rows = sampling.sample(self.base, prompts, self.settings.max_new_tokens, 20_000 + self.seed)
        rewards = sampling.rewards_of(rows, self.tokenizer, self.reward).view(-1, most)
        for n in self.settings.best_of:
            reward, error, kl = sampling.best_of(rewards, n)
            yield {"n": n, "kl": kl, "kl_se": 0.0, "reward": reward, "reward_se": error}

    def rloo(self, beta: float) -> Iterator[Point]:
        held = self.tokenizer, self.reward, self.prompts, beta, self.settings, self.seed
        steps, policy = train_rloo(self.base_folder, self.folder / "rloo", *held)
        yield {"steps": steps, **self.measure(policy)}

    def run(self, only: list[str]) -> None:
        """Everything that is not there yet."""
        self.once("reference", "", self.reference)
        if not only or "Best-of-N" in only:
            self.once("Best-of-N", "", self.best_of)
        for run in runs(self.settings):
            if not only or run.method in only:
                self.once(run.method, run.setting, lambda run=run: self.trained(run))
        if importlib.util.find_spec("trl") is None:
            notice("RLOO: not run, it needs TRL (pip install 'fused-dpo[peers]')")
            return
        for beta in self.settings.rl_betas:
            if not only or "RLOO" in only:
                self.once("RLOO", f"beta {beta:g}", lambda beta=beta: self.rloo(beta))

    def points(self) -> list[Point]:
        """All that is kept."""
        paths = sorted((self.folder / "points").glob("*.json"))
        return [point for path in paths for point in json.loads(path.read_text())]


def same_settings(path: Path, settings: Any) -> None:
    """Writes the settings beside the points, or holds them to those that are there."""
    found = json.dumps(dataclasses.asdict(settings), indent=1)
    if not path.exists():
        write_text(path, found)
    if path.read_text() != found:
        raise UserError(f"{path.parent}: expected points of the same settings, found others; remove the folder")


def main() -> None:
    parser = argparse.ArgumentParser(description="Reward against KL to the reference, for every method.")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M-Instruct as the reference: takes hours")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD", help="such as DPO or preferred-ft")
    parser.add_argument("--work", type=Path, default=CACHE / "frontier", help="folder of what is finished")
    parser.add_argument("--snippets", type=Path, default=CACHE / "snippets", help="folder of the text and the scorer")
    parser.add_argument("--output", type=Path, help="folder of the figure, the table and the JSON file")
    arguments = parser.parse_args()
    sizes = (SMOLLM2, QUICK_SMOLLM2) if arguments.smollm2 else (FULL, QUICK)
    settings = sizes[arguments.quick]
    output = Path("bench/results/paper") if settings is FULL else arguments.work / settings.name
    output = arguments.output or output
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    fetch_snippets.fetch(arguments.snippets)
    if settings.model:
        fetch_smollm2.fetch(CACHE / settings.model)
    points = []
    for seed in arguments.seeds:
        torch.manual_seed(seed)
        experiment = Experiment(settings, seed, arguments.work, arguments.snippets)
        experiment.run(arguments.only)
        points += experiment.points()
    write_results(output, points, settings)
    say((output / "frontier.md").read_text())


if __name__ == "__main__":
    run_script(main)
