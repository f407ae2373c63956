"""Files, folders and datasets in; one-line errors for what cannot be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from dpo.errors import UserError
from dpo.readers import read_rows

ROWS = [{"prompt": f"p{i}", "chosen": "None", "rejected": "007" if i else "2020-01-01"} for i in range(10)]


def rows_of(source: Any, **options: Any) -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_rows(source, **options).numbered()]


def error_of(source: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        rows_of(source, **options)
    message = str(caught.value)
    assert message.startswith("--data")
    assert "\n" not in message
    return message


def written(folder: Path, name: str) -> str:
    path = folder / name
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    header = "prompt,chosen,rejected\n"
    table = header + "".join(",".join(row.values()) + "\n" for row in ROWS)
    if name.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress((table if ".csv" in name else lines).encode()))
    elif name.endswith(".csv"):
        path.write_text(table)
    elif name == "lines.json" or name.lower().endswith(".jsonl"):
        path.write_text(lines)
    elif name == "object.json":
        path.write_text(json.dumps({"version": "1", "data": ROWS}, indent=1))
    else:
        path.write_text(json.dumps(ROWS, indent=1))
    return str(path)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


FILES = ["a.jsonl", "a.json", "object.json", "lines.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.csv.gz", "A.JSONL"]


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, name)
    capsys.readouterr()
    assert rows_of(path) == ROWS
    assert rows_of(Path(path), split="train") == ROWS
    assert rows_of(path, split="train[:30%]") == ROWS[:3]
    assert rows_of(path, split="train[-2:]") == ROWS[8:]
    assert rows_of(path, split="train[2:-7]") == ROWS[2:3]
    assert "found validation" in error_of(path, split="validation")
    assert "found train[" in error_of(path, split="train[")
    assert "found none of 10" in error_of(path, split="train[5:5]")
    assert capsys.readouterr() == ("", "")


def test_row_numbers_are_lines_of_a_jsonl_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"a": 1}\n\n{"a": "x\\u2028y"}\r\n{"a":\r"\u2028"}', encoding="utf-8", newline="")
    expected = [(1, {"a": 1}), (3, {"a": "x\u2028y"}), (4, {"a": "\u2028"})]
    assert list(read_rows(path).numbered()) == expected
    assert [len(batch) for batch in read_rows(path).batches(2)] == [2, 1]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "line 2: expected one JSON object; found broken JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', "line 2: expected one JSON object; found an array"),
        ("a.json", '[{"a": 1},\n{"a": }]', "line 2: expected a JSON array of objects; found broken JSON"),
        ("a.json", '{"a": 1}\n{"a"', "line 2: expected one JSON object; found broken JSON"),
        ("a.json", "[1]", "row 1: expected a JSON object; found a number"),
        ("a.json", "null", "expected a JSON array of objects; found null"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "line 3: expected 2 fields as in the header; found 3"),
        ("a.csv", 'a,b\n1,"2\n', "expected CSV; found unexpected end of data"),
        ("a.jsonl", "", "expected rows; found an empty file"),
        ("a.parquet", "PAR1", "`datasets` cannot load it"),
        ("a.txt", "x", "expected a file ending in .jsonl, .json, .csv, .parquet"),
        ("data", "x", "found no suffix"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, text: str, expected: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    message = error_of(str(path))
    assert expected in message
    assert str(path) in message


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "\xff"}')
    assert "expected UTF-8 text; found byte 0xff" in error_of(path)
    broken = tmp_path / "a.jsonl.gz"
    broken.write_bytes(b"not gzip")
    assert "cannot be read" in error_of(broken)


def test_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "pairs.jsonl: no such file or folder" in error_of("pairs.jsonl")
    assert "no such file or folder" in error_of(str(tmp_path / "nothing"))
    assert "no such file or folder" in error_of("./nothing")


def test_csv_reads_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        'prompt,completions,scores,chosen\nQ,"[""a"", ""b""]","[1, 2]","[{""role"": ""user"", ""content"": ""x""}]"\n'
        'Q,[broken,"[1]","[not a list]"\n'
    )
    first, second = rows_of(path)
    assert first == {
        "prompt": "Q",
        "completions": ["a", "b"],
        "scores": [1, 2],
        "chosen": [{"role": "user", "content": "x"}],
    }
    assert second == {"prompt": "Q", "completions": "[broken", "scores": [1], "chosen": "[not a list]"}


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = datasets.Dataset.from_list(ROWS)
    saved, splits, files, empty = (tmp_path / name for name in ("saved", "splits", "files", "empty"))
    table.save_to_disk(saved)
    datasets.DatasetDict({"train": table.select(range(3)), "test": table.select(range(3, 10))}).save_to_disk(splits)
    files.mkdir()
    empty.mkdir()
    written(files, "a.parquet")
    capsys.readouterr()
    assert rows_of(str(saved)) == rows_of(str(files)) == ROWS
    assert rows_of(str(splits)) == ROWS[:3]
    assert rows_of(str(splits), split="test[:2]") == ROWS[3:5]
    assert "expected a split called dev; found train, test" in error_of(str(splits), split="dev")
    assert "found an empty folder" in error_of(str(empty))
    assert capsys.readouterr() == ("", "")
    assert datasets.is_progress_bar_enabled()


def test_dataset_ids_go_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load_dataset(*arguments: Any) -> datasets.DatasetDict:
        asked.append(arguments)
        if arguments[0] == "no/such":
            raise FileNotFoundError("Couldn't find\nany data")
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of("owner/name") == rows_of("owner/name:config", split="test") == ROWS
    assert asked == [("owner/name", None), ("owner/name", "config")]
    assert error_of("no/such").endswith("no/such: `datasets` cannot load it: FileNotFoundError: Couldn't find")


def test_rows_in_memory() -> None:
    assert rows_of(ROWS) == rows_of(datasets.Dataset.from_list(ROWS)) == ROWS
    assert rows_of(datasets.Dataset.from_list(ROWS), split="train[:1]") == ROWS[:1]
    assert "found none" in error_of(datasets.Dataset.from_list([]))
