"""Reading rows: a file, a folder, a dataset id, or rows in memory, as batches of plain dicts with their row numbers.

JSON and CSV files are read here rather than by the JSON and CSV builders of `datasets`: those type a whole column by
what its first block looks like (the text "None" becomes a missing value, "007" a number, a date a timestamp; one odd
row fails the file) and do not say which line is broken. Parquet files, dataset folders and dataset ids go through
`datasets`.

Row numbers count from 1; in a JSON Lines file they are line numbers.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from dpo.errors import UserError

Row = Mapping[str, Any]
NumberedRow = tuple[int, Row]
Source = str | Path | datasets.Dataset | Sequence[Row]

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")
_SLICE = re.compile(r"(?P<split>[^\[\]]+)(?:\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Rows:
    """Rows of one source. `label` names it in messages; `numbered()` starts a fresh pass over (row number, row)."""

    label: str
    numbered: Callable[[], Iterator[NumberedRow]]

    def batches(self, size: int) -> Iterator[list[NumberedRow]]:
        rows = self.numbered()
        while batch := list(islice(rows, size)):
            yield batch


def read_rows(source: Source, *, split: str | None = None, name: str = "--data", quiet: bool = True) -> Rows:
    """The rows of `source`: a path ending in one of `SUFFIXES`, a folder, a dataset id, a `datasets.Dataset`, or a
    sequence of dicts.

    `split`: a split's name, optionally with a slice as in `train[:90%]` (rows or per cent). A file is one split called
    train. Raises UserError, one line that starts with `name`, when there is nothing to read.
    """
    if isinstance(source, datasets.Dataset):
        return _from_dataset(source, f"{name} (a Dataset)", split, name)
    if not isinstance(source, str | Path):
        rows = list(source)
        return _sliced(Rows(f"{name} ({len(rows)} rows in memory)", lambda: iter(enumerate(rows, 1))), split, name)
    path = Path(source).expanduser()
    suffix = _suffix(path)
    if path.is_file():
        if suffix is None:
            raise UserError(
                f"{name} {source}: expected a file ending in {', '.join(SUFFIXES)}; found {path.suffix or 'no suffix'}"
            )
        return _from_file(path, suffix, split, name, quiet)
    if path.is_dir():
        return _from_hub(str(path), split, name, quiet, folder=path)
    if suffix is not None or path.is_absolute() or str(source).startswith((".", "~")):
        raise UserError(f"{name} {source}: no such file or folder (looked in {Path.cwd()})")
    return _from_hub(str(source), split, name, quiet)


def _suffix(path: Path) -> str | None:
    lowered = path.name.lower()
    return next((suffix for suffix in SUFFIXES if lowered.endswith(suffix)), None)


def _from_file(path: Path, suffix: str, split: str | None, name: str, quiet: bool) -> Rows:
    label = f"{name} {path}"
    if path.stat().st_size == 0:
        raise UserError(f"{label}: expected rows; found an empty file")
    if suffix == ".parquet":
        with _library(label, quiet):
            table = datasets.load_dataset("parquet", data_files=str(path), split="train")
        assert isinstance(table, datasets.Dataset)
        return _from_dataset(table, label, split, name)
    readers = {".jsonl": _json_lines, ".json": _json_document, ".csv": _csv_rows}
    reader = readers[suffix.removesuffix(".gz")]
    return _sliced(Rows(label, lambda: reader(path, label)), split, name)


# --- JSON and CSV -----------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, label: str, newline: str = "\n") -> Iterator[io.TextIOBase]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline=newline) as file:
            yield file  # pyright: ignore[reportReturnType]
    except UnicodeDecodeError as error:
        raise UserError(
            f"{label}: expected UTF-8 text; found byte 0x{error.object[error.start]:02x} at {error.start}"
        ) from None
    except (OSError, EOFError) as error:
        raise UserError(f"{label}: cannot be read: {error}") from None


def _json_lines(path: Path, label: str) -> Iterator[NumberedRow]:
    with _opened(path, label) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                found = f"{error.msg} at column {error.colno}"
                raise UserError(
                    f"{label}, line {number}: expected one JSON object; found broken JSON ({found})"
                ) from None
            except RecursionError:
                raise UserError(
                    f"{label}, line {number}: expected one JSON object; found JSON nested too deep"
                ) from None
            except ValueError as error:  # a number of too many digits
                raise UserError(f"{label}, line {number}: expected one JSON object; found {error}") from None
            if not isinstance(row, dict):
                raise UserError(f"{label}, line {number}: expected one JSON object; found {_kind(row)}")
            yield number, row


def _json_document(path: Path, label: str) -> Iterator[NumberedRow]:
    """A JSON array of objects, an object that holds one such array, or JSON Lines under another name."""
    with _opened(path, label) as file:
        text = file.read()
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from _json_lines(path, label)
            return
        raise UserError(
            f"{label}, line {error.lineno}: expected a JSON array of objects; "
            f"found broken JSON ({error.msg} at column {error.colno})"
        ) from None
    except RecursionError:
        raise UserError(f"{label}: expected a JSON array of objects; found JSON nested too deep") from None
    except ValueError as error:
        raise UserError(f"{label}: expected a JSON array of objects; found {error}") from None
    if isinstance(document, dict):
        arrays = [
            value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        whole = len(arrays) != 1 or {"chosen", "completions", "human_ref_A"} & document.keys()
        document = [document] if whole else arrays[0]
    if not isinstance(document, list):
        raise UserError(f"{label}: expected a JSON array of objects; found {_kind(document)}")
    for number, row in enumerate(document, 1):
        if not isinstance(row, dict):
            raise UserError(f"{label}, row {number}: expected a JSON object; found {_kind(row)}")
        yield number, row


def _csv_rows(path: Path, label: str) -> Iterator[NumberedRow]:
    """Every field is text, as written; fields that hold a JSON list (completions, scores, messages) are read as one."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _opened(path, label, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for number, row in enumerate(reader, 1):
                if None in row:
                    width = len(reader.fieldnames or ())
                    found = f"{width + len(row[None])}"
                    raise UserError(
                        f"{label}, line {reader.line_num}: expected {width} fields as in the header; found {found}"
                    )
                yield number, {key: _json_cell(key, value) for key, value in row.items()}
        except csv.Error as error:
            raise UserError(f"{label}, line {reader.line_num}: expected CSV; found {error}") from None


def _json_cell(key: str, value: str | None) -> Any:
    listed = key in ("completions", "scores", "ranks")
    if value is None or not value.startswith("[" if listed else '[{"'):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _kind(value: object) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


# --- `datasets` -------------------------------------------------------------------------------------------------------


@contextmanager
def _library(label: str, quiet: bool) -> Iterator[None]:
    """Run a loader of `datasets`: no progress bars unless asked for, and any failure as one line."""
    silenced = quiet and datasets.is_progress_bar_enabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs before it raises, it raises
    if silenced:
        datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library raises whatever its builders and file systems raise
        # A builder's own failure says only that one happened; its cause says what.
        cause = error.__cause__ or error
        first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
        raise UserError(f"{label}: `datasets` cannot load it: {type(cause).__name__}: {first}") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if silenced:
            datasets.enable_progress_bars()


def _from_hub(source: str, split: str | None, name: str, quiet: bool, folder: Path | None = None) -> Rows:
    """A folder written by `save_to_disk`, a folder of data files, or a dataset id (`owner/name`, or
    `owner/name:config`)."""
    label = f"{name} {source}"
    if folder is not None and not any(folder.iterdir()):
        raise UserError(f"{label}: expected data files; found an empty folder")
    with _library(label, quiet):
        if folder is not None and ((folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()):
            loaded = datasets.load_from_disk(source)
        elif folder is not None:
            loaded = datasets.load_dataset(source)
        else:
            path, _, config = source.partition(":")
            loaded = datasets.load_dataset(path, config or None)
    if isinstance(loaded, datasets.Dataset):
        return _from_dataset(loaded, label, split, name)
    assert isinstance(loaded, datasets.DatasetDict)
    wanted = _parse_split(split, name)[0] if split else ("train" if len(loaded) > 1 else next(iter(loaded)))
    if wanted not in loaded:
        raise UserError(f"{label}: expected a split called {wanted}; found {', '.join(map(str, loaded))}")
    return _from_dataset(loaded[wanted], label, split, name, splits=(str(wanted),))


def _from_dataset(
    table: datasets.Dataset, label: str, split: str | None, name: str, splits: Sequence[str] = ("train",)
) -> Rows:
    if len(table) == 0:
        raise UserError(f"{label}: expected rows; found none")
    plain = table.with_format(None)

    def numbered() -> Iterator[NumberedRow]:
        start = 1
        for batch in plain.iter(batch_size=1000):
            assert isinstance(batch, dict)
            columns = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield start, dict(zip(columns, values, strict=True))
                start += 1

    return _sliced(Rows(label, numbered), split, name, splits)


# --- Splits -----------------------------------------------------------------------------------------------------------


def _parse_split(split: str, name: str) -> tuple[str, str | None, str | None]:
    match = _SLICE.fullmatch(split)
    if match is None:
        raise UserError(f"{name}: expected a split such as train or train[:90%]; found {split}")
    return match["split"], match["start"], match["stop"]


def _sliced(rows: Rows, split: str | None, name: str, splits: Sequence[str] = ("train",)) -> Rows:
    if split is None:
        return rows
    wanted, first, last = _parse_split(split, name)
    if wanted not in splits:
        raise UserError(f"{rows.label}: expected the split {' or '.join(splits)}, the only one here; found {split}")
    if first is None and last is None:
        return rows
    total = _count(rows.numbered())
    start, stop = _bound(first, total, 0), _bound(last, total, total)
    if start >= stop:
        raise UserError(f"{rows.label}: expected rows in the split {split}; found none of {total}")
    return Rows(f"{rows.label} {split}", lambda: islice(rows.numbered(), start, stop))


def _bound(text: str | None, total: int, default: int) -> int:
    if text is None:
        return default
    value = round(float(text[:-1]) * total / 100) if text.endswith("%") else int(text)
    return min(max(value + total if value < 0 else value, 0), total)


def _count(items: Iterable[object]) -> int:
    return sum(1 for _ in items)
