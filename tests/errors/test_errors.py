"""Bad input: every case of the table gets the line that the table says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.errors.cases import CASES
from tests.errors.table import TABLE, answer, make_toy, row

QUICK = {"YAML", "call", "run folder"}
ORDER = list(dict.fromkeys(case.category for case in CASES))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("errors"))


@pytest.mark.parametrize(
    "category", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ORDER]
)
def test_the_table_is_what_happens(toy, tmp_path, category):
    """`python -m tests.errors.table` writes the table anew."""
    lines = [line + "\n" for line in TABLE.read_text().splitlines() if line.startswith(f"| {category} |")]
    cases = [case for case in CASES if case.category == category]
    assert len(lines) == len(cases)
    for k, (case, line) in enumerate(zip(cases, lines, strict=True)):
        here = tmp_path / str(k)
        here.mkdir()
        assert row(case, answer(case, here, toy)) == line
        written = (here / "run" / "config.yaml").exists()
        # a reference of its own is loaded when the run has begun
        late = category in ("checkpoint", "run folder", "NaN weights") or "reference" in case.what
        assert not written or late


def test_every_entry_point_and_category_is_covered():
    entries = {case.entry for case in CASES}
    assert entries >= {"train", "train --resume", "score", "cache", "merge", "report", "doctor", "Python"}
    names = {"file", "row", "flag", "YAML", "model", "tokenizer", "checkpoint", "run folder", "NaN weights", "call"}
    names |= {"adapter", "store"}
    assert set(ORDER) == names
    assert len({case.name for case in CASES}) == len(CASES)


def test_pickles_are_never_run(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoiled = [case for case in CASES if "pickle" in case.what]
    assert len(spoiled) == 2
    for case in spoiled:
        here = tmp_path / case.category
        here.mkdir()
        answer(case, here, toy)
    assert not (tmp_path / "pwned").exists()


def test_the_table_has_no_paths_of_a_machine():
    text = TABLE.read_text()
    assert "/tmp" not in text
    assert str(Path.home()) not in text
