"""Comparisons of scored completions: by example, by property, and through `load_preferences`."""

from __future__ import annotations

import json
from itertools import combinations, permutations
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.comparisons import Comparisons, NoComparison, candidates, choose_pairs, decided_pairs, rank
from dpo.data import PreferenceData, load_preferences
from dpo.errors import UserError
from tests.data import tiny

SCORES = [3.0, 5.0, 1.0, 5.0, 2.5]
"""By score: 1 and 3 tie for the best, then 0, 4, 2."""

PAIRS = {
    "all": [(1, 0), (0, 2), (3, 0), (0, 4), (1, 2), (1, 4), (3, 2), (4, 2), (3, 4)],
    "best-vs-worst": [(1, 2)],
    "best-vs-rest": [(1, 0), (1, 2), (1, 4)],
    "adjacent": [(3, 0), (0, 4), (4, 2)],
}
TIES = {"all": 1, "best-vs-worst": 0, "best-vs-rest": 1, "adjacent": 1}


def choose(scores: list[float], comparisons: Comparisons, row: int = 1) -> list[tuple[int, int]]:
    return choose_pairs(candidates(scores, comparisons).pairs, scores, comparisons, row)


@pytest.mark.parametrize("kind", PAIRS)
def test_by_example(kind: Any) -> None:
    comparisons = Comparisons(kind)
    assert sorted(choose(SCORES, comparisons)) == sorted(PAIRS[kind])
    assert candidates(SCORES, comparisons).ties == TIES[kind]


def test_minimum_gap_leaves_out_and_counts() -> None:
    comparisons = Comparisons("adjacent", min_gap=1.0)
    assert choose(SCORES, comparisons) == [(3, 0), (4, 2)]  # 3.0 and 2.5 are too close
    found = candidates(SCORES, comparisons)
    assert (found.ties, found.close) == (1, 1)
    assert candidates(SCORES, Comparisons(min_gap=2.0)).close == 2
    assert choose(SCORES, Comparisons("best-vs-rest", min_gap=2.5)) == [(1, 2), (1, 4)]
    assert choose([1.0, 2.0], Comparisons(min_gap=1.0)) == [(1, 0)]
    with pytest.raises(NoComparison, match=r"no two scores 1\.5 apart"):
        candidates([1.0, 2.0], Comparisons(min_gap=1.5))
    with pytest.raises(NoComparison, match="all scores tie"):
        candidates([2.0, 2.0, 2.0], Comparisons())


def test_random_pairs_stay_the_same_and_depend_on_seed_and_row() -> None:
    drawn = [choose(SCORES, Comparisons("random", seed=0), row) for row in range(200)]
    assert drawn == [choose(SCORES, Comparisons("random", seed=0), row) for row in range(200)]
    assert drawn != [choose(SCORES, Comparisons("random", seed=1), row) for row in range(200)]
    assert {pair for pairs in drawn for pair in pairs} == set(PAIRS["all"])
    assert all(len(pairs) == 1 for pairs in drawn)


@given(st.lists(st.integers(0, 3), min_size=2, max_size=7))
def test_all_pairs_are_those_that_differ_better_first(scores: list[float]) -> None:
    if len(set(scores)) == 1:
        return
    pairs = candidates(scores, Comparisons()).pairs
    assert all(scores[better] > scores[worse] for better, worse in pairs)
    expected = [(i, j) for i, j in combinations(range(len(scores)), 2) if scores[i] != scores[j]]
    assert [tuple(sorted(pair)) for pair in pairs] == expected
    assert candidates(scores, Comparisons()).ties == len(scores) * (len(scores) - 1) // 2 - len(pairs)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(1, 6) | st.none())
def test_rankings_are_all_orders_that_the_scores_allow(scores: list[float], top_k: int | None) -> None:
    indices = range(len(scores))
    try:
        orders = rank(indices, scores, top_k)
    except NoComparison:
        tied = [level for level in set(scores) if scores.count(level) > 3]
        assert any(top_k is None or sum(s > level for s in scores) < top_k for level in tied)
        return
    allowed = {
        order
        for order in permutations(indices)
        if all(scores[a] >= scores[b] for a, b in zip(order, order[1:]))  # noqa: B905, RUF007
    }
    assert len({tuple(order) for order in orders}) == len(orders)
    assert {tuple(order) for order in orders} <= allowed
    # what the loss can see of an order: its first places, and the set behind them
    seen = {(order[:top_k], frozenset(order)) for order in allowed}
    assert {(tuple(order[:top_k]), frozenset(order)) for order in orders} >= seen
    if top_k is None:
        assert len(orders) == len(allowed)


def test_pairs_that_a_ranking_decides() -> None:
    pairs = PAIRS["all"]
    orders = rank(range(5), SCORES, None)
    assert orders == [[1, 3, 0, 4, 2], [3, 1, 0, 4, 2]]
    assert decided_pairs(pairs, orders, None) == pairs
    assert {pair[0] for pair in decided_pairs(pairs, orders, 1)} == {1, 3}
    assert {pair[0] for pair in decided_pairs(pairs, orders, 2)} == {1, 3}
    assert {pair[0] for pair in decided_pairs(pairs, orders, 3)} == {1, 3, 0}


# --- Through the loader -----------------------------------------------------------------------------------------------


def load(rows: list[dict[str, Any]], comparisons: Comparisons | None = None, **options: Any) -> PreferenceData:
    tokenizer = tiny.chatml()
    return load_preferences(
        rows, tokenizer, eos_token_ids=tiny.eos_of(tokenizer), comparisons=comparisons, max_bad_fraction=0.0, **options
    )


def row(*scores: float, texts: str = "abcdefg", by: str = "scores") -> dict[str, Any]:
    return {"prompt": "Q:", "completions": [f" {c}" for c in texts[: len(scores)]], by: list(scores)}


def shown(data: PreferenceData, index: int = 0) -> list[tuple[str, str]]:
    texts = [text.strip() for text in data.texts(index)["completions"]]
    return [(texts[w], texts[lo]) for w, lo in data[index].pairs]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("best-vs-worst", [("b", "c")]), ("adjacent", [("d", "a"), ("a", "e"), ("e", "c")])],
)
def test_loaded_groups_hold_what_is_compared_and_no_more(kind: Any, expected: list[tuple[str, str]]) -> None:
    data = load([row(*SCORES)], Comparisons(kind))
    assert shown(data) == expected
    assert len(data[0].completions) == len({text for pair in expected for text in pair})
    assert data.num_pairs(0) == len(expected)
    assert data[0].rankings == []


def test_ranks_are_scores_the_other_way_round() -> None:
    by_rank = load([row(2, 1, 5, 1, 3, by="ranks")], Comparisons("ranking"))
    by_score = load([row(*SCORES)], Comparisons("ranking"))
    assert by_rank[0].rankings == by_score[0].rankings == [[1, 3, 0, 4, 2], [3, 1, 0, 4, 2]]
    assert by_rank.num_pairs(0) == 1
    assert by_rank.report.lines()[0].split("; ")[1].endswith("1 rankings (9 pairs), 5 completions")
    assert "averaged 1 rankings over the orders of equal scores" in by_rank.report.lines()


def test_rows_that_compare_nothing_are_counted_but_are_not_bad() -> None:
    rows = [row(1, 2), row(3, 3), row(1, 1, 1, 1, 2), row(1, 1, 1, 2)]
    assert load(rows).report.lines()[1] == "dropped 1 of 4 rows: all scores tie 1 (row 2)"
    ranked = load(rows, Comparisons("ranking"))
    assert [len(group.rankings) for group in ranked] == [1, 6]
    assert "more than 3 equal scores in a ranking 1 (row 3)" in ranked.report.lines()[1]
    assert ranked.report.bad_rows == 0
    # a large tie behind the places that are choices has no orders to average
    assert [len(group.rankings) for group in load(rows, Comparisons("ranking", top_k=1))] == [1, 1, 1]
    gaps = load([row(1, 2, 4), row(1, 1.5)], Comparisons(min_gap=1.5)).report
    assert "no two scores 1.5 apart 1 (row 2)" in gaps.lines()[1]
    assert "left out 1 pairs closer than the minimum gap" in gaps.lines()
    with pytest.raises(UserError, match="at least one usable row; found 1 of 1 rows"):
        load([row(3, 3)])


def test_an_empty_best_completion_leaves_the_next_best() -> None:
    texts = {**row(9, 5, 1), "completions": [" ", " b", " c"]}
    assert shown(load([texts], Comparisons("best-vs-worst"))) == [("b", "c")]
    assert load([texts], Comparisons("ranking"))[0].rankings == [[0, 1]]


def test_identical_completions_of_a_ranking_keep_the_first() -> None:
    data = load([row(5, 4, 3, 2, texts="abac")], Comparisons("ranking"))
    assert data.texts(0)["completions"] == [" a", " b", " c"]
    assert data[0].rankings == [[0, 1, 2]]
    assert data.report.pairs_dropped["identical completions in a ranking"] == 1
    assert data.sources(0) == ([1, 1, 1], [0, 1, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_gap": -1.0}, "--min-score-gap: expected zero or more"),
        ({"kind": "ranking", "min_gap": 1.0}, "--min-score-gap: expected 0 with --comparisons ranking"),
        ({"top_k": 2}, "--ranking-top-k: expected --comparisons ranking"),
        ({"kind": "ranking", "top_k": 0}, "--ranking-top-k: expected a positive number"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Comparisons(**options)


# --- Merged prompts ---------------------------------------------------------------------------------------------------


def flat(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ROWS = [
    flat("Q:", " a", " b"),
    flat("R:", " a", " b"),
    flat("Q:", " a", " c"),
    flat("S:", " a", " b"),
    flat("Q:", " b", " a"),
    flat("Q:", " d", " a"),
    flat("R:", " a", " b"),
]


def test_rows_with_one_prompt_become_one_group() -> None:
    data = load(ROWS, merge=10)
    assert [group.row for group in data] == [1, 2, 4]
    assert shown(data) == [("a", "b"), ("a", "c"), ("b", "a"), ("d", "a")]
    assert len(data[0].completions) == 4
    assert data.sources(0) == ([1, 3, 5, 6], [0, 1, 1, 0])
    assert shown(data, 1) == [("a", "b"), ("a", "b")]  # a pair that comes twice counts twice
    report = data.report
    assert (report.groups, report.pairs, report.completions) == (3, 7, 8)
    expected = (
        "merged 4 rows into the group of an earlier row with the same prompt; 6 of their completions were there "
        "already and are computed once"
    )
    assert expected in report.lines()


def test_most_pairs_of_a_group_and_no_merging() -> None:
    assert [group.row for group in load(ROWS, merge=2)] == [1, 2, 4, 5]
    assert [group.row for group in load(ROWS, merge=1)] == [1, 2, 3, 4, 5, 6, 7]
    assert len(load(ROWS)) == 7
    # completions of scored rows stay apart: scores of different rows may not compare
    assert len(load([row(1, 2), row(2, 1)], merge=10)) == 2


def test_merged_groups_hold_the_pairs_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo.merge.BATCH_GROUPS", 2)
    tokens = {}
    for merge in (None, 3):
        data = load(ROWS * 3, merge=merge)
        tokens[merge] = sorted(
            (data.sources(i)[0][k], json.dumps([data[i].prompt, data[i].completions[w], data[i].completions[lo]]))
            for i in range(len(data))
            for k, (w, lo) in enumerate(data[i].pairs)
        )
    assert tokens[None] == tokens[3]
