"""Toy runs from the command line, on data made to bring something out."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.cli import main

Row = dict[str, Any]


def word(draw: random.Random, low: int, high: int, letters: str = "abcdefgh") -> str:
    return "".join(draw.choices(letters, k=draw.randint(low, high)))


def even(k: int, draw: random.Random) -> Row:
    """Different letters, lengths that say nothing."""
    return {"prompt": f"{k} ", "chosen": word(draw, 4, 9), "rejected": word(draw, 4, 9, "ijklmnop")}


def near(k: int, draw: random.Random) -> Row:
    """One letter apart: telling them apart costs both sides their probability."""
    same = word(draw, 10, 14)
    return {"prompt": f"{k} ", "chosen": f"{same}a{same}", "rejected": f"{same}b{same}"}


def longer(k: int, draw: random.Random) -> Row:
    """The better completion is the longer one, always."""
    return {"prompt": f"{k} ", "chosen": word(draw, 12, 20), "rejected": word(draw, 2, 4)}


def write_rows(path: Path, row: Callable[[int, random.Random], Row], count: int = 32, seed: int = 0) -> Path:
    draw = random.Random(seed)
    path.write_text("".join(json.dumps(row(k, draw)) + "\n" for k in range(count)))
    return path


def train(model: Path, data: Path, output: Path, *flags: str) -> Path:
    """`dpo train` on the toy model, 8 pairs a step, without warm-up; flags come last and win."""
    words = ["train", "--model", str(model), "--data", str(data), "--output", str(output), "--pairs-per-step", "8"]
    main([*words, "--warmup-steps", "0", "--lr", "3e-4", "--max-steps", "4", "--log-every", "1000", *flags])
    return output
