"""What a run shows of itself while it goes, beside its records: warnings, trackers, held-out pairs, samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo.config import TrainConfig
from dpo.console import notice
from dpo.evalpairs import EvalPairs
from dpo.metrics import JsonLines
from dpo.sampler import Sampler
from dpo.signs import Signs
from dpo.trackers import finite, open_trackers


class Watch:
    """Sees every record of a run.

    pairs: collects the pairs of an evaluation. sampler: writes at evaluations. Both may come later, or never.
    """

    def __init__(self, run: Path, config: TrainConfig, *, start: int) -> None:
        self.run = run
        self.signs = Signs(beta=config.beta, lr=config.lr, has_reference=config.reference != "none")
        self.warnings = JsonLines(run / "warnings.jsonl", before_step=start)
        self.trackers = open_trackers(run, config, start=start)
        self.pairs: EvalPairs | None = None
        self.sampler: Sampler | None = None

    def resume(self, metrics: Iterable[Mapping[str, Any]]) -> None:
        """Takes over the records of the steps before, where a run goes on."""
        self.signs.replay(metrics, self.warnings.kept)

    def step(self, record: Mapping[str, Any]) -> None:
        """Takes a step's record, as metrics.jsonl has it."""
        step = int(record["step"])
        for sign in self.signs.see(record):
            notice(str(sign))
            self.warnings.write(sign.record())
            for tracker in self.trackers:
                tracker.text(step, "warnings", str(sign))
        for tracker in self.trackers:
            tracker.numbers(step, finite(record, "train"))

    @property
    def see(self) -> Callable[..., None] | None:
        """What an evaluation shows its log-probs to."""
        return self.pairs.see if self.pairs is not None else None

    def evaluated(self, record: Mapping[str, Any]) -> None:
        """Takes an evaluation's record, as eval.jsonl has it, after `see` saw all of it."""
        step = int(record["step"])
        for tracker in self.trackers:
            tracker.numbers(step, finite(record, "eval"))
        if self.pairs is not None:
            records = self.pairs.write(self.run / "eval_pairs.jsonl", step)
            for tracker in self.trackers:
                tracker.histogram(step, "eval/margins", [r["chosen_reward"] - r["rejected_reward"] for r in records])

    def sample(self, done: int) -> dict[str, Any]:
        """Samples after `done` updates, where they are asked for; returns what the evaluation's record says of them."""
        if self.sampler is None:
            return {}
        found, shown = self.sampler(done)
        for tracker in self.trackers:
            tracker.text(done, "samples", shown)
        return found

    def sync(self) -> None:
        """Waits until all records written so far are on the disk."""
        self.warnings.sync()
        if self.sampler is not None:
            self.sampler.file.sync()

    def close(self) -> None:
        self.warnings.close()
        if self.sampler is not None:
            self.sampler.close()
        for tracker in self.trackers:
            tracker.close()
