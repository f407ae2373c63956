"""Rewards and lengths of every held-out pair at the latest evaluation: eval_pairs.jsonl, of which the report draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo.distributed import gathered, is_main
from dpo.durable import write_text
from dpo.engine import StepResult
from dpo.loss import RefLogps
from dpo.metrics import completion_sums
from dpo.steps import Preferences, StepBatch


class EvalPairs:
    """Collects one evaluation, bin by bin, from the log-probs that it computes anyway."""

    def __init__(self, data: Preferences, ref_logps: RefLogps, beta: float) -> None:
        self.data, self.ref_logps, self.beta = data, ref_logps, beta
        self._rewards: dict[tuple[int, int], float] = {}

    def see(self, step: StepBatch, result: StepResult) -> None:
        """Takes the log-probs of one chunk of the evaluation. Waits for the device."""
        del step
        for b, logps in result.logps:
            # summed token by token: the difference of two long sums loses digits
            reference = self.ref_logps(b)
            if not b.members:  # the dummy of a rank that has nothing to do
                continue
            ratios = logps.double() if reference is None else logps.double() - reference.double()
            ratios = completion_sums(ratios, b.batch).tolist()
            keys = [(group, completion) for group, held in b.members for completion in held]
            self._rewards.update(zip(keys, (self.beta * ratio for ratio in ratios), strict=True))

    def records(self, step: int) -> list[dict[str, Any]]:
        """A record a pair, in the order of the data, after `step` updates."""
        found = []
        for index in range(len(self.data)):
            group = self.data[index]
            for chosen, rejected in group.pairs:
                found.append(
                    {
                        "step": step,
                        "row": group.row,
                        "chosen_reward": round(self._rewards[index, chosen], 5),
                        "rejected_reward": round(self._rewards[index, rejected], 5),
                        "chosen_tokens": len(group.completions[chosen]),
                        "rejected_tokens": len(group.completions[rejected]),
                    }
                )
        return found

    def write(self, path: Path, step: int) -> list[dict[str, Any]]:
        """Replaces the file at `path`; returns what it holds. Of several ranks each has seen its pairs, and 0 writes."""
        for theirs in gathered(self._rewards):
            self._rewards |= theirs
        records = self.records(step)
        if is_main():
            write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        return records
