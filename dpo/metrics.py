"""What a step and an evaluation report: true means over pairs, summed on the device and read once.

T pairs, C completions, N completion rows.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from dpo.distributed import on_main
from dpo.durable import write_text
from dpo.packing import PackedBatch
from dpo.resident import peak_bytes

_SUMS = (
    "loss",
    "pairs",
    "correct",
    "chosen_reward",
    "rejected_reward",
    "chosen_logp",
    "rejected_logp",
    "chosen_tokens",
    "rejected_tokens",
    "margin_squared",
    "length_squared",
    "margin_length",
)


class PairSums:
    """Sums over pairs, in float64 on the device; nothing here waits for it."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)

    def add(self, *, loss: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor, share: float = 1.0) -> None:
        """Adds the pairs of a bin.

        Args:
            loss: scalar, already weighted: the step's loss is the sum over its bins.
            chosen_rewards, rejected_rewards: [T]. A margin of exactly zero counts as half correct.
            share: weight of this loss in the whole, where the loss was weighted within a part of it.
        """
        margins = chosen_rewards.double() - rejected_rewards.double()
        self.sums[0] += loss.detach() * share
        self.sums[1] += len(margins)
        self.sums[2] += (margins > 0).sum() + 0.5 * (margins == 0).sum()
        self.sums[3] += chosen_rewards.double().sum()
        self.sums[4] += rejected_rewards.double().sum()

    def add_logps(self, completion_logps: Tensor, lengths: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Adds the summed log-probs [C] and lengths [C] of the completions on either side of the pairs [T]."""
        lengths = lengths.to(completion_logps.device)
        for k, side in ((5, chosen), (6, rejected)):
            self.sums[k] += completion_logps.detach().double()[side].sum()
            self.sums[k + 2] += lengths[side].sum()

    def add_lengths(self, margins: Tensor, lengths: Tensor, chosen: Tensor, rejected: Tensor) -> None:
        """Adds what the correlation of reward and length within pairs needs: margins [T], lengths [C]."""
        lengths = lengths.to(margins.device).double()
        margins, longer = margins.double(), lengths[chosen] - lengths[rejected]
        self.sums[9] += margins.square().sum()
        self.sums[10] += longer.square().sum()
        self.sums[11] += (margins * longer).sum()

    @property
    def loss(self) -> Tensor:
        """The step's loss so far, a float64 scalar on the device."""
        return self.sums[0]

    def read(self) -> dict[str, float]:
        """The means. Waits for the device."""
        s = dict(zip(_SUMS, self.sums.tolist(), strict=True))
        pairs = max(s["pairs"], 1.0)
        return {
            "loss": s["loss"],
            "accuracy": s["correct"] / pairs,
            "margin": (s["chosen_reward"] - s["rejected_reward"]) / pairs,
            "chosen_reward": s["chosen_reward"] / pairs,
            "rejected_reward": s["rejected_reward"] / pairs,
            "chosen_logps_per_token": s["chosen_logp"] / max(s["chosen_tokens"], 1.0),
            "rejected_logps_per_token": s["rejected_logp"] / max(s["rejected_tokens"], 1.0),
            "chosen_tokens": s["chosen_tokens"] / pairs,
            "rejected_tokens": s["rejected_tokens"] / pairs,
            "margin_squared": s["margin_squared"] / pairs,
            # of the deviations from the pair's mean: 1 where rewards grow with length, 0 where they do not depend on it
            "length_correlation": s["margin_length"] / max((s["margin_squared"] * s["length_squared"]) ** 0.5, 1e-12),
            "pairs": int(s["pairs"]),
        }


def completion_sums(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sums per-row `values` [N] over completions [C], in float64."""
    out = torch.zeros(batch.num_completions, dtype=torch.float64, device=values.device)
    return out.index_add_(0, batch.completion_ids, values.detach().double())


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far: the allocator's on CUDA, else the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()


class JsonLines:
    """Appends one JSON object a line; on resume, drops the lines from `before_step` on. Of several ranks, 0 writes."""

    file: TextIO | None = None

    def __init__(self, path: Path, before_step: int = 0) -> None:
        self.kept = on_main(lambda: self._open(path, before_step))

    def _open(self, path: Path, before_step: int) -> list[dict[str, Any]]:
        lines = read_json_lines(path) if path.exists() else []
        kept = [line for line in lines if line.get("step", before_step) < before_step]
        write_text(path, "".join(map(_line, kept)))
        self.file = path.open("a", encoding="utf-8")
        return kept

    def write(self, record: dict[str, Any]) -> None:
        if self.file is not None:
            self.file.write(_line(record))
            self.file.flush()

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        if self.file is not None:
            os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def _line(record: dict[str, Any]) -> str:
    # NaN is not JSON: a value that is not finite is written as null.
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl or eval.jsonl, up to a line that a crash cut short."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        records.append(record)
    return records
