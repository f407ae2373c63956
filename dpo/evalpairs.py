"""Rewards and lengths of every held-out pair at the latest evaluation: eval_pairs.jsonl, of which the report draws."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from dpo.data import PreferenceData
from dpo.durable import write_text
from dpo.engine import StepResult
from dpo.steps import StepBatch


class EvalPairs:
    """Collects the rewards that an evaluation computes anyway, chunk by chunk."""

    def __init__(self, data: PreferenceData) -> None:
        self.data = data
        self._rewards: dict[int, list[tuple[float, float]]] = {}

    def see(self, step: StepBatch, result: StepResult) -> None:
        """Takes the rewards of one chunk of the evaluation. Waits for the device."""
        del step
        for groups, chosen, rejected in result.rewards:
            pairs = zip(chosen.tolist(), rejected.tolist(), strict=True)
            for group in groups:
                self._rewards[group] = list(islice(pairs, len(self.data[group].pairs)))

    def records(self, step: int) -> list[dict[str, Any]]:
        """A record a pair, in the order of the data, after `step` updates."""
        found = []
        for index, rewards in sorted(self._rewards.items()):
            group, (rows, _) = self.data[index], self.data.sources(index)
            for row, (chosen, rejected), (won, lost) in zip(rows, group.pairs, rewards, strict=True):
                found.append(
                    {
                        "step": step,
                        "row": row,
                        "chosen_reward": round(won, 5),
                        "rejected_reward": round(lost, 5),
                        "chosen_tokens": len(group.completions[chosen]),
                        "rejected_tokens": len(group.completions[rejected]),
                    }
                )
        return found

    def write(self, path: Path, step: int) -> list[dict[str, Any]]:
        """Replaces the file at `path`; returns what it holds."""
        records = self.records(step)
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        return records
