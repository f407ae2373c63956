"""Bad input by category and entry point: what is wrong, and how it is handed in.

A case makes its input in a folder of its own, `here`, and returns command-line words, or a function to call. `toy` is a
folder with a good model, data and a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GOOD = {"prompt": "a ", "chosen": "b", "rejected": "c"}
Make = Callable[[Path, Path], "list[str] | Callable[[], object]"]


@dataclass(frozen=True)
class Case:
    """make(here, toy) prepares the input."""

    category: str
    entry: str
    what: str
    make: Make

    @property
    def name(self) -> str:
        return f"{self.category}: {self.entry}: {self.what}"


CASES: list[Case] = []


def case(category: str, entry: str, what: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        CASES.append(Case(category, entry, what, make))
        return make

    return keep


def train_words(here: Path, toy: Path, *flags: str) -> list[str]:
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(here / "run")]
    return [*words, "--max-steps", "1", "--pairs-per-step", "4", "--log-to", "none", *flags]


def score_words(here: Path, toy: Path, *flags: str) -> list[str]:
    words = ["score", "--model", str(toy / "model"), "--reference", str(toy / "model")]
    return [*words, "--data", str(toy / "pairs.jsonl"), "--output", str(here / "scores.jsonl"), *flags]
