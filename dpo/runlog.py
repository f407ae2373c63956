"""The record of a run: metrics.jsonl, eval.jsonl, the progress line, and what to do about updates that were skipped."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from dpo.checkpoint import writing
from dpo.console import Bar, brief, notice, say
from dpo.engine import StepResult
from dpo.errors import UserError
from dpo.metrics import JsonLines, peak_memory_bytes
from dpo.optim import Update
from dpo.steps import StepBatch
from dpo.watch import Watch


class RunLog:
    """Writes a line for every step, one step late: its numbers are read when the device has long finished it.

    Records carry the number of updates before them in `step`: both files say what the weights after `step` updates do.
    """

    def __init__(self, run: Path, *, start: int, max_skipped: int, watch: Watch) -> None:
        self.run = run
        with writing(run):
            self.metrics = JsonLines(run / "metrics.jsonl", before_step=start)
            self.eval = JsonLines(run / "eval.jsonl", before_step=start + 1)
        self.evals: list[dict[str, Any]] = list(self.eval.kept)
        self.watch = watch
        watch.resume(self.metrics.kept)
        self.max_skipped, self.skipped_in_a_row = max_skipped, 0
        self._pending: tuple[StepBatch, StepResult, Update, dict[str, float]] | None = None
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves what was done since the last step (evaluation, saving) out of the next step's time."""
        self._clock = time.perf_counter()

    def push(self, bar: Bar, step: StepBatch, result: StepResult, update: Update, lr: float) -> None:
        """Takes a step's device tensors and writes the step before it."""
        now = time.perf_counter()
        host = {"lr": lr, "step_seconds": now - self._clock}
        self._clock = now
        before, self._pending = self._pending, (step, result, update, host)
        if before is not None:
            self._write(bar, *before)

    def flush(self, bar: Bar) -> None:
        """Writes the last step."""
        if self._pending is not None:
            before, self._pending = self._pending, None
            self._write(bar, *before)

    def _write(self, bar: Bar, step: StepBatch, result: StepResult, update: Update, host: dict[str, float]) -> None:
        # host sync: the only one of a step, and it waits for the step before the one that runs
        means = result.sums.read()
        scale = update.overflow if update.loss_scale is None else update.loss_scale
        numbers = (update.grad_norm, update.skipped, update.overflow, scale, *result.routers)
        norm, skipped, overflow, scale, *routers = torch.stack([number.double() for number in numbers]).tolist()
        seconds = host["step_seconds"]
        record = {"step": step.index, "epoch": step.epoch, **means, "grad_norm": norm, **host} | {
            "pairs_per_second": step.num_pairs / seconds,
            "tokens_per_second": step.num_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(update.grad_norm.device),
            "bins": len(step.all_bins),
            "fill": step.fill,
            "skipped": bool(skipped),
        }
        if update.loss_scale is not None:
            record["loss_scale"] = scale
        if routers:
            record["router_aux_loss"] = routers[0]
        with writing(self.run):
            self.metrics.write(record)
        bar.advance(pairs=step.num_pairs, tokens=step.num_tokens, info=brief(record))
        self.watch.step(record)
        if overflow:
            notice(f"step {step.index}: fp16 gradients overflowed at a loss scale of {scale:g}, which is halved")
            return
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if skipped:
            notice(f"step {step.index}: loss or gradient not finite, update skipped ({_suspects(result)})")
        if self.skipped_in_a_row >= self.max_skipped:
            raise NotFinite(
                f"step {step.index}: {self.skipped_in_a_row} updates in a row were not finite ({_suspects(result)}); "
                "stopped with the last good weights saved"
            )

    def evaluated(self, done: int, means: dict[str, float]) -> None:
        """Writes the evaluation after `done` updates."""
        record = {"step": done, **means}
        with writing(self.run):
            self.eval.write(record)
        self.evals.append(record)
        self.watch.evaluated(record)
        say(f"held out after {done} steps: {brief(means)}")

    def has_evaluated(self, done: int) -> bool:
        """Whether the evaluation after `done` updates is written."""
        return any(record["step"] == done for record in self.evals)

    def sync(self) -> None:
        """Waits until all records written so far are on the disk."""
        with writing(self.run):
            self.metrics.sync()
            self.eval.sync()
            self.watch.sync()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with; the records are in the files."""
        return {"skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_in_a_row = state["skipped_in_a_row"]

    def close(self) -> None:
        self.metrics.close()
        self.eval.close()
        self.watch.close()


class NotFinite(UserError):
    """A run of updates that were not finite."""


def _suspects(result: StepResult) -> str:
    """The rows whose log-probs are not finite, or else all rows of the step."""
    rows: list[object] = []
    for b, logps in result.logps:
        groups = b.batch.group_of_completion.to(logps.device)[b.batch.completion_ids]
        bad = groups[~torch.isfinite(logps)].unique().tolist()
        rows += [b.batch.rows[g] for g in bad]
    label = "rows with log-probs that are not finite" if rows else "rows of the step, all with finite log-probs"
    rows = rows or [row for b, _ in result.logps for row in b.batch.rows]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"{label}: {', '.join(map(str, rows[:8]))}{more}"
