"""The comparison of rankings and pairs on real reviews: its data, its counts and its errors."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from bench.data.fetch_movies import movies_of
from bench.rankings import FULL, Measure, estimate, groups_of, measure, split, summarise, table


def test_movies_with_reviews_of_both_kinds_and_no_text_on_both_sides() -> None:
    long = "one two three four five six"
    rows = [
        ("plot", "A  plot.", "the_film"),
        ("fresh", f"{long} good", "the_film"),
        ("rotten", f"{long} bad", "the_film"),
        ("fresh", f"{long} both", "the_film"),
        ("rotten", f"{long} both", "the_film"),
        ("fresh", "too short", "the_film"),
        ("fresh", f"{long} alone", "another"),
    ]
    (movie,) = movies_of(dict(zip(("category", "text", "movie_name"), row, strict=True)) for row in rows)
    assert movie == {"title": "the film", "plot": "A plot.", "fresh": [f"{long} good"], "rotten": [f"{long} bad"]}


def movie(fresh: int, rotten: int, title: str = "a") -> dict[str, Any]:
    sides = {"fresh": [f"good {k}" for k in range(fresh)], "rotten": [f"bad {k}" for k in range(rotten)]}
    return {"title": title, "plot": "p " * 100, **sides}


@pytest.mark.parametrize(("fresh", "rotten", "groups"), [(1, 1, 1), (2, 9, 2), (7, 9, 3), (10, 4, 4), (30, 30, 10)])
def test_groups_have_up_to_three_of_either_kind(fresh: int, rotten: int, groups: int) -> None:
    rows = groups_of(movie(fresh, rotten), FULL, random.Random(0))
    assert len(rows) == groups
    for row in rows:
        assert {len(row["completions"]), len(row["scores"])} <= set(range(2, 7))
        assert 1 <= sum(row["scores"]) <= 3
        assert 1 <= row["scores"].count(0) <= 3
        assert all(
            (" good" in text) == bool(score) for text, score in zip(row["completions"], row["scores"], strict=True)
        )
    texts = [text for row in rows for text in row["completions"]]
    assert len(set(texts)) == len(texts)


def test_parts_share_no_movie() -> None:
    movies = [movie(1, 1, str(k)) for k in range(40)]
    parts = split(movies, FULL)
    assert {name: len(part) for name, part in parts.items()} == {"validation": 6, "test": 10, "train": 24}
    assert sorted(m["title"] for part in parts.values() for m in part) == sorted(m["title"] for m in movies)


def test_counts_by_hand() -> None:
    def record(row: int, chosen: float, rejected: float) -> dict[str, Any]:
        return {"row": row, "chosen_reward": chosen, "rejected_reward": rejected, "margin": chosen - rejected}

    records = [record(1, c, r) for c in (3.0, 1.0) for r in (2.0, 1.0)] + [record(2, 0.0, 0.5)]
    found = measure(records)
    assert found.correct.tolist() == [2.5, 0.0]  # 3>2, 3>1, 1=1
    assert found.pairs.tolist() == [4.0, 1.0]
    assert found.best.tolist() == [1.0, 0.0]


def test_errors_count_movies_and_seeds() -> None:
    pairs = torch.ones(4, dtype=torch.float64)
    one = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=torch.float64)
    mean, error = estimate(one, pairs)
    assert mean == 0.75
    assert error == pytest.approx(one.std().item() / math.sqrt(4))
    two = torch.stack([pairs, 0 * pairs])
    mean, error = estimate(two, pairs)
    assert mean == 0.5
    assert error == pytest.approx(math.sqrt(0.5 / 2))  # every movie alike: the seeds' spread is all there is


def test_the_same_movies_cancel_in_a_difference() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = torch.randint(5, 30, (50,), generator=draw).double()
    share = torch.rand(50, generator=draw).double()
    plain = Measure((share * pairs).round(), pairs, (share > 0.5).double())
    better = Measure((plain.correct + 1).clamp(max=pairs), pairs, plain.best)
    rows = summarise({"Plackett-Luce": [better], "all pairs": [plain], "best against worst": [plain]})
    gain, error = rows["Plackett-Luce"]["accuracy_less_all_pairs"]
    assert gain > 5 * error > 0
    assert error < rows["all pairs"]["accuracy"][1]
    assert rows["best against worst"]["accuracy_less_all_pairs"] == (0.0, 0.0)
    for row in rows.values():
        row |= {"lr": 1e-3, "validation": {"0.001": (0.5, 0.1)}}
    assert "| `best-vs-worst` | 0.001 | 0.500 ± 0.100 |" in table(rows)
