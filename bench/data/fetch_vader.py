"""Preference pairs with real margins: movie-review snippets that people rated for sentiment.

    python -m bench.data.fetch_vader --output .cache/fused-dpo/vader

Writes train.jsonl and heldout.jsonl, in the conversational format, each row with the two snippets' mean ratings. The
ratings (-4 most negative, 4 most positive, at least 20 raters a snippet) come from Hutto and Gilbert, "VADER: A
Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text", ICWSM 2014, the snippets from Pang and Lee's
review collection; both are in the MIT-licensed source distribution of vaderSentiment, which pip downloads. Ratings of
sentiment are turned into preferences here: nobody was asked which of two texts they prefer.
"""

from __future__ import annotations

import argparse
import io
import random
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.data.download import CACHE, pip_download, require_sha256, run_script, write_jsonl
from dpo.errors import UserError

REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SNIPPETS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
PROMPT = "Write one sentence from a movie review."
MIN_WORDS = 4
MIN_GAP = 2.0
HELD_OUT = 512  # pairs
SEED = 2014


class Snippet(NamedTuple):
    """A piece of a review and the mean of its ratings, from -4 to 4."""

    text: str
    rating: float


def parse_snippets(table: str) -> list[Snippet]:
    """Read lines of `id TAB mean rating TAB text`; a text that occurs twice counts once, with its first rating."""
    ratings: dict[str, float] = {}
    for number, line in enumerate(table.splitlines(), start=1):
        fields = line.split("\t")
        try:
            _, rating, text = fields
            ratings.setdefault(" ".join(text.split()), float(rating))
        except ValueError:
            raise UserError(
                f"{SNIPPETS}, line {number}: expected id, rating and text between tabs, found {line!r}"
            ) from None
    return [Snippet(text, rating) for text, rating in ratings.items()]


def build_pairs(snippets: Sequence[Snippet], *, seed: int = SEED) -> list[tuple[Snippet, Snippet]]:
    """Pair the best-rated third with the worst-rated third at random: (chosen, rejected), no snippet in two pairs.

    Fragments shorter than MIN_WORDS words are left out, and pairs whose ratings are less than MIN_GAP apart.
    """
    ranked = sorted(snippets, key=lambda snippet: (snippet.rating, snippet.text))
    third = len(ranked) // 3
    worst, best = (
        [snippet for snippet in part if len(snippet.text.split()) >= MIN_WORDS]
        for part in (ranked[:third], ranked[len(ranked) - third :])
    )
    random_order = random.Random(seed)
    random_order.shuffle(worst)
    random_order.shuffle(best)
    pairs = zip(best, worst, strict=False)
    return [(chosen, rejected) for chosen, rejected in pairs if chosen.rating - rejected.rating >= MIN_GAP]


def as_row(pair: tuple[Snippet, Snippet]) -> Mapping[str, object]:
    """One row of the conversational preference format, the two ratings beside it."""
    chosen, rejected = pair
    return {
        "prompt": [{"role": "user", "content": PROMPT}],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "score_chosen": chosen.rating,
        "score_rejected": rejected.rating,
    }


def read_archive(archive: Path) -> list[Snippet]:
    """The rated snippets inside the source distribution."""
    require_sha256(archive, SHA256)
    with tarfile.open(archive) as outer:
        inner = outer.extractfile(INNER_ARCHIVE)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            table = tar.extractfile(SNIPPETS)
            assert table is not None
            return parse_snippets(table.read().decode("utf-8"))


def fetch(output: Path, archive: Path | None = None) -> None:
    """Write train.jsonl and heldout.jsonl into `output`; do nothing if both are there."""
    train, held_out = output / "train.jsonl", output / "heldout.jsonl"
    if train.is_file() and held_out.is_file():
        print(f"{output}: already there")
        return
    if archive is not None and not archive.is_file():
        raise UserError(f"--archive: {archive} is not a file")
    with tempfile.TemporaryDirectory() as folder:
        snippets = read_archive(archive or pip_download(REQUIREMENT, Path(folder), source=True))
    pairs = build_pairs(snippets)
    write_jsonl(held_out, map(as_row, pairs[:HELD_OUT]))
    write_jsonl(train, map(as_row, pairs[HELD_OUT:]))
    print(f"{output}: {len(pairs)} pairs, {len(pairs) - HELD_OUT} in train.jsonl and {HELD_OUT} in heldout.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build preference pairs from movie-review snippets rated by people.")
    parser.add_argument("--output", type=Path, default=CACHE / "vader", help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument(
        "--archive", type=Path, help=f"the source distribution of {REQUIREMENT}, instead of downloading it"
    )
    arguments = parser.parse_args()
    fetch(arguments.output, arguments.archive)


if __name__ == "__main__":
    run_script(main)
