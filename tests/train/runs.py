"""A short run with dropout, held-out pairs and a checkpoint every step, and what of it must come out the same again."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from dpo.metrics import read_json_lines
from tests.train.toy import write_toy

STEPS = 3
_TIMES = ("step_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes")


def write_small(folder: Path) -> Path:
    """The model and the pairs of such a run."""
    return write_toy(folder, pairs=12, held_out=3, attention_dropout=0.1)


def words(toy: Path, output: Path, *flags: str) -> list[str]:
    return [
        *("train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output)),
        *("--eval-data", str(toy / "held_out.jsonl"), "--eval-every", "2", "--pairs-per-step", "4"),
        *("--lr", "1e-3", "--warmup-steps", "1", "--max-steps", str(STEPS), "--save-every", "1", "--no-check-sharing"),
        *("--reference-cache", str(output.with_name("store"))),
        *("--dropout", "--padded", "--keep-checkpoints", "1", "--log-to", "none"),  # with dropout the generators count
        *flags,
    ]


def result(run: Path) -> tuple[dict[str, torch.Tensor], list, list]:
    """The weights and the records of a run, without what depends on the clock."""
    metrics = [{k: v for k, v in r.items() if k not in _TIMES} for r in read_json_lines(run / "metrics.jsonl")]
    return load_file(run / "model" / "model.safetensors"), metrics, read_json_lines(run / "eval.jsonl")


def same(a: tuple, b: tuple) -> bool:
    weights = a[0].keys() == b[0].keys() and all(torch.equal(tensor, b[0][name]) for name, tensor in a[0].items())
    return weights and a[1:] == b[1:]
