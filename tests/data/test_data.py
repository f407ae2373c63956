"""`load_preferences` as a whole: bad rows counted by reason, limits, the report, storage, and holding data out."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dpo.spool
from dpo.data import PreferenceData, load_preferences, split_off
from dpo.errors import UserError
from tests.data import tiny
from tests.data.tiny import write_jsonl

GOOD = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
RANKED = {"prompt": "Q:", "completions": [" a", " b"], "scores": [2, 1]}


def load(source: Any, tokenizer: Any = None, **options: Any) -> PreferenceData:
    tokenizer = tokenizer or tiny.bos_first()
    options.setdefault("eos_token_ids", tiny.eos_of(tokenizer))
    return load_preferences(source, tokenizer, **options)


def error_of(source: Any, tokenizer: Any = None, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(source, tokenizer, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Bad rows ---------------------------------------------------------------------------------------------------------

HH = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
SHP = {"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}
BAD = [
    (GOOD, {**GOOD, "chosen": ""}, "empty completion"),
    (GOOD, {**GOOD, "rejected": " \n"}, "empty completion"),
    (GOOD, {**GOOD, "chosen": "</s>"}, "empty completion once tokenised and truncated"),
    (GOOD, {**GOOD, "rejected": " yes"}, "identical chosen and rejected"),
    (GOOD, {**GOOD, "rejected": " yes</s>"}, "identical chosen and rejected once tokenised and truncated"),
    (GOOD, {**GOOD, "chosen": None}, "field 'chosen' missing"),
    (GOOD, {"prompt": "Q:", "rejected": " no"}, "field 'chosen' missing"),
    (GOOD, {"chosen": " yes", "rejected": " no"}, "field 'prompt' missing"),
    (GOOD, {**GOOD, "prompt": 5}, "field 'prompt' is not text"),
    (GOOD, {**GOOD, "chosen": "\ud800"}, "text that is not valid Unicode"),
    (HH, {**HH, "chosen": "no marks"}, "transcripts without a shared assistant turn"),
    (HH, {**HH, "rejected": HH["chosen"]}, "identical chosen and rejected"),
    (HH, {**HH, "rejected": "\n\nHuman: a\n\nAssistant:"}, "empty completion"),
    (SHP, {**SHP, "labels": 2}, "field 'labels' is neither 0 nor 1"),
    (SHP, {**SHP, "labels": True}, "field 'labels' is neither 0 nor 1"),
    (RANKED, {**RANKED, "scores": [1, None]}, "field 'scores' holds something that is not a finite number"),
    (RANKED, {**RANKED, "scores": [1, float("nan")]}, "field 'scores' holds something that is not a finite number"),
    (RANKED, {**RANKED, "scores": "1, 2"}, "field 'scores' is not a list"),
    (RANKED, {**RANKED, "scores": [1]}, "as many completions as scores expected"),
    (RANKED, {**RANKED, "completions": "a"}, "field 'completions' is not a list"),
    (RANKED, {**RANKED, "completions": [" a", 3]}, "field 'completions' holds something that is not text"),
    (RANKED, {**RANKED, "completions": [" a"], "scores": [1]}, "fewer than two completions"),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD, ids=[f"{i}-{case[2][:28]}" for i, case in enumerate(BAD)])
def test_bad_rows_are_counted_and_dropped(good: Any, bad: Any, reason: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [good, bad, good, good, bad])
    data = load(path, max_bad_fraction=0.4)
    assert [group.row for group in data] == [1, 3, 4]
    report = data.report
    assert (report.rows, report.groups, report.bad_rows) == (5, 3, 2)
    assert list(report.dropped) == [reason]
    assert report.dropped[reason].first_rows == [2, 5]
    assert report.lines()[1].startswith(f"dropped 2 of 5 rows: {reason} 2 (rows 2, 5")
    message = error_of(path, max_bad_fraction=0.39)
    assert message.startswith(f"--data {path}, read as {report.format}: expected at most a fraction of 0.39")
    assert f"found 2 of 5 rows that cannot be used: {reason} 2 (rows 2, 5" in message


def test_more_reasons_and_rows_than_are_shown() -> None:
    rows = [GOOD] * 90 + [{**GOOD, "chosen": ""}] * 7 + [{**GOOD, "chosen": " no"}] * 2
    report = load(rows, max_bad_fraction=0.1).report
    expected = (
        "dropped 9 of 99 rows: empty completion 7 (rows 91, 92, 93, 94, 95, ..); "
        "identical chosen and rejected 2 (rows 98, 99)"
    )
    assert report.lines()[1] == expected


def test_default_fraction_and_nothing_left() -> None:
    bad = {**GOOD, "chosen": ""}
    assert load([GOOD] * 95 + [bad] * 5).report.bad_rows == 5
    assert "--max-bad-fraction" in error_of([GOOD] * 94 + [bad] * 6)
    assert "expected at least one usable row; found 2 of 2" in error_of([bad, bad], max_bad_fraction=1.0)
    assert "expected rows; found none" in error_of([])


def test_empty_prompt() -> None:
    rows = [{**GOOD, "prompt": ""}, GOOD]
    assert load(rows)[0].prompt == [1]
    report = load(rows, tiny.chatml(), max_bad_fraction=0.5).report
    assert list(report.dropped) == ["empty prompt, and the tokenizer has no BOS to stand for it"]


# --- Limits -----------------------------------------------------------------------------------------------------------


def test_truncation() -> None:
    tokenizer = tiny.bos_first()
    long = {"prompt": "The quick brown fox", "chosen": " jumps over the lazy dog", "rejected": " no"}
    whole = load([long])[0]
    data = load([long, GOOD], max_prompt_length=3, max_completion_length=2)
    group = data[0]
    assert list(group.prompt) == [1, *whole.prompt[-2:]]
    assert list(group.completions[0]) == list(whole.completions[0][:2])
    assert tokenizer.eos_token_id not in group.completions[0]  # cut short: not taught to stop
    assert list(group.completions[1]) == list(whole.completions[1]) == [*whole.completions[1][:-1], 2]
    assert data.texts(0) == {"prompt": long["prompt"], "completions": [long["chosen"], long["rejected"]]}
    assert (data.report.truncated_prompts, data.report.truncated_completions) == (1, 1)
    assert "truncated 1 prompts from the left, to 3 tokens" in data.report.lines()
    assert "truncated 1 completions from the right; they get no end-of-sequence" in data.report.lines()


def test_identical_after_truncation_is_dropped() -> None:
    row = {"prompt": "Q:", "chosen": " a good day", "rejected": " a good night"}
    report = load([row, GOOD], max_completion_length=2, max_bad_fraction=0.5).report
    assert list(report.dropped) == ["identical chosen and rejected once tokenised and truncated"]
    assert report.truncated_completions == 0  # of what is kept


def test_prompt_that_fills_the_whole_limit() -> None:
    long = {**GOOD, "prompt": "The quick brown fox jumps over the lazy dog"}
    length = len(load([long])[0].prompt)
    data = load([long, GOOD], max_length=length, max_bad_fraction=0.5)
    assert list(data.report.dropped) == ["prompt that fills the whole length limit"]
    fits = load([long, GOOD], max_length=length + 1)
    assert [len(ids) for ids in fits[0].completions] == [1, 1]
    shorter = load([long, GOOD], max_length=length, max_prompt_length=length - 1)
    assert len(shorter) == 2


@pytest.mark.parametrize("flag", ["max_prompt_length", "max_completion_length", "max_length"])
def test_limits_are_checked(flag: str) -> None:
    assert error_of([GOOD], **{flag: 0}).startswith(f"--{flag.replace('_', '-')}: expected at least 1 token; found 0")


# --- End-of-sequence --------------------------------------------------------------------------------------------------


def test_pad_is_eos_keeps_its_target() -> None:
    tokenizer = tiny.chatml()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = {"prompt": [tiny.user("hi")], "chosen": "yes", "rejected": "no"}
    for ids in load([GOOD], tokenizer)[0].completions, load([row], tokenizer)[0].completions:
        assert [list(completion).count(tokenizer.eos_token_id) for completion in ids] == [1, 1]
        assert [completion[-1] for completion in ids] == [tokenizer.eos_token_id] * 2


def test_any_id_that_ends_a_generation_counts() -> None:
    tokenizer = tiny.bos_first()
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = {"prompt": "Q:", "chosen": " yes<|im_end|>\n", "rejected": " no"}
    group = load([row], eos_token_ids=[tokenizer.eos_token_id, turn])[0]
    assert [completion[-1] for completion in group.completions] == [turn, tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in group.completions[0]


def test_text_after_an_end_of_sequence_is_cut_and_counted() -> None:
    data = load([{"prompt": "Q:", "chosen": " yes</s> and more", "rejected": " no"}])
    assert tiny.bos_first().decode(data[0].completions[0]) == " yes</s>"
    assert "cut 1 completions at an end-of-sequence inside them" in data.report.lines()


# --- What comes out ---------------------------------------------------------------------------------------------------


def many(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i % 50}:", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(count)]


def test_order_and_sequence() -> None:
    rows = many(2500)
    rows[7] = {**rows[7], "chosen": ""}
    data = load(rows)
    assert len(data) == 2499
    assert [group.row for group in data] == [*range(1, 8), *range(9, 2501)]
    assert data[-1] == data[2498]
    assert data.texts(7)["completions"][0] == " yes 8"
    part = data[5:8]
    assert [group.row for group in part] == [6, 7, 9]
    assert [part.lengths(i) for i in range(3)] == [data.lengths(i) for i in (5, 6, 7)]
    assert (part.total_pairs, data.total_pairs) == (3, 2499)
    with pytest.raises(IndexError):
        data[2499]
    with pytest.raises(IndexError):
        part.lengths(3)


def test_ids_are_plain_ints() -> None:
    group = load([GOOD])[0]
    assert all(type(token) is int for token in [*group.prompt, *group.completions[0], *group.pairs[0], group.row])


@pytest.mark.parametrize("memory_bytes", [10**9, 0])
def test_storage_and_pickle(memory_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo.spool, "MEMORY_BYTES", memory_bytes)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    expected = list(load(many(2100)))
    assert not list(tmp_path.iterdir())
    data = load(many(2100))
    assert len(list(tmp_path.glob("*/*.arrow"))) == (memory_bytes == 0)
    assert list(data) == expected
    held = split_off(data, count=84)[1]
    copied = pickle.loads(pickle.dumps(data))
    assert list(copied) == expected
    del data, copied
    assert len(list(tmp_path.glob("*/*.arrow"))) == (memory_bytes == 0)
    assert len(list(held)) == 84
    del held
    assert not list(tmp_path.iterdir())


def test_a_failed_load_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpo.spool, "MEMORY_BYTES", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    error_of([GOOD, {**GOOD, "chosen": ""}])
    assert not list(tmp_path.iterdir())


def test_report_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD, GOOD])
    data = load(path, tiny.chatml())
    assert data.report.lines() == [
        f"--data {path}: explicit prompt (prompt, chosen, rejected); 2 rows, 2 prompts, 2 pairs, 4 completions; "
        "longest prompt 2, completion 2 tokens",
        "plain text: used as it is, without the tokenizer's chat template",
    ]
    assert capsys.readouterr() == ("", "")


def test_name_of_the_flag_leads_the_error(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert error_of(path, name="--eval-data").startswith(f"--eval-data {path}: expected the columns ")


def test_types_may_change_from_row_to_row(tmp_path: Path) -> None:
    rows = [{**GOOD, "extra": 1}, {**GOOD, "extra": "text"}, {**GOOD, "prompt": [1]}, {**GOOD, "chosen": "2020-01-01"}]
    data = load(write_jsonl(tmp_path / "a.jsonl", rows), max_bad_fraction=0.25)
    assert data.texts(2)["completions"][0] == "2020-01-01"
    (tmp_path / "b.json").write_text(json.dumps(rows))
    assert list(load(tmp_path / "b.json", max_bad_fraction=0.25)) == list(data)


# --- Holding data out -------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    prompts=st.lists(st.integers(0, 12), min_size=8, max_size=60),
    fraction=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**32 - 1),
)
def test_split_off_keeps_prompts_on_one_side(prompts: list[int], fraction: float, seed: int) -> None:
    data = load([{**GOOD, "prompt": f"Question {i}:"} for i in prompts])
    sizes = np.unique(prompts, return_counts=True)[1]
    wanted = round(fraction * len(prompts))
    if sizes.min() > wanted:
        with pytest.raises(UserError, match="different prompt"):
            split_off(data, fraction=fraction, seed=seed)
        return
    rest, held = split_off(data, fraction=fraction, seed=seed)
    rows = [[group.row for group in side] for side in (rest, held)]
    assert sorted(rows[0] + rows[1]) == list(range(1, len(prompts) + 1))
    assert all(side == sorted(side) for side in rows)
    assert not {tuple(group.prompt) for group in rest} & {tuple(group.prompt) for group in held}
    assert wanted - sizes.max() < len(held) <= wanted
    again = split_off(data, fraction=fraction, seed=seed)[1]
    assert [group.row for group in again] == rows[1]


def test_split_off_by_count_and_seed() -> None:
    data = load([{**GOOD, "prompt": f"Question {i}:"} for i in range(100)])
    rest, held = split_off(data, count=10, seed=1)
    assert (len(rest), len(held)) == (90, 10)
    other = split_off(data, count=10, seed=2)[1]
    assert [group.row for group in other] != [group.row for group in held]
    same = load([GOOD] * 20)
    rest, held = split_off(same, fraction=0.25, keep_prompts_together=False)
    assert (len(rest), len(held)) == (15, 5)
    with pytest.raises(UserError, match="found 1 different prompt, the rarest in 20 groups"):
        split_off(same, fraction=0.25)
    refused: list[dict[str, Any]] = [{"count": 100}, {"count": 0}, {"fraction": 1.0}, {"fraction": 0.0}]
    for wrong in refused:
        with pytest.raises(UserError, match="expected to hold out from 1 to 99 groups"):
            split_off(data, **wrong)
    with pytest.raises(ValueError, match="one of them"):
        split_off(data)
    with pytest.raises(ValueError, match="one of them"):
        split_off(data, count=1, fraction=0.5)
