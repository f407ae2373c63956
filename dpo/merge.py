"""Rows of a flat (prompt, chosen, rejected) file that share a prompt become one group: the prompt is computed once for
all of them, and so is a completion that stands in several pairs.

The pairs stay the same, a pair that comes twice counts twice, and so do loss and gradient of a step that holds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import datasets
import pyarrow as pa

from dpo.datareport import DataReport
from dpo.spool import Spool

BATCH_GROUPS = 500


def merge_prompts(
    table: datasets.Dataset, schema: pa.Schema, report: DataReport, *, most_pairs: int
) -> datasets.Dataset:
    """`table` with one row a group, in the order of first rows; counts what was merged in `report`.

    Equality is that of token ids, after truncation. A group takes at most `most_pairs` pairs, and the next row of its
    prompt begins another: one prompt must not make up whole steps.
    """
    members = _members(prompt_keys(table), most_pairs)
    report.merged = len(table) - len(members)
    if not report.merged:
        return table
    with Spool(schema) as spool:
        for start in range(0, len(members), BATCH_GROUPS):
            wanted = members[start : start + BATCH_GROUPS]
            flat = sorted(index for rows in wanted for index in rows)
            rows = dict(zip(flat, _rows(table, flat), strict=True))
            spool.add(_merged([rows[index] for index in group]) for group in wanted)
        merged = spool.finish()
    before = report.completions
    report.groups = len(members)
    report.completions = sum(len(row) for batch in _column(merged, "sources") for row in batch)
    report.repeated = before - report.completions
    return merged


def prompt_keys(table: datasets.Dataset) -> list[bytes]:
    """A digest of the prompt's token ids of every row of a table."""
    keys: list[bytes] = []
    for chunk in table.data.column("prompt").chunks:
        offsets, values = chunk.offsets.to_numpy(), chunk.values.to_numpy()
        keys += [blake2b(values[a:b].tobytes(), digest_size=16).digest() for a, b in pairwise(offsets)]
    return keys


def _members(keys: Iterable[bytes], most: int) -> list[list[int]]:
    groups: list[list[int]] = []
    open_group: dict[bytes, int] = {}
    for index, key in enumerate(keys):
        place = open_group.get(key)
        if place is None or len(groups[place]) >= most:
            open_group[key] = place = len(groups)
            groups.append([])
        groups[place].append(index)
    return groups


def _rows(table: datasets.Dataset, indices: list[int]) -> list[dict[str, Any]]:
    found: Any = table[indices]
    return found.to_pylist()


def _column(table: datasets.Dataset, name: str) -> Iterator[list[Any]]:
    for chunk in table.data.column(name).chunks:
        yield chunk.to_pylist()


def _merged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One group of rows with the same prompt. Every row has its own completions and pairs among them."""
    group = rows[0]
    if len(rows) == 1:
        return group
    place: dict[tuple[int, ...], int] = {}
    found: dict[str, list[Any]] = {name: [] for name in ("completions", "completion_texts", "sources")}
    pairs: dict[str, list[int]] = {name: [] for name in ("chosen", "rejected", "pair_rows")}
    for row in rows:
        here = []
        for completion, text, source in zip(row["completions"], row["completion_texts"], row["sources"], strict=True):
            key = tuple(completion)
            if key not in place:
                place[key] = len(place)
                for name, value in zip(found, (completion, text, source), strict=True):
                    found[name].append(value)
            here.append(place[key])
        pairs["chosen"] += [here[index] for index in row["chosen"]]
        pairs["rejected"] += [here[index] for index in row["rejected"]]
        pairs["pair_rows"] += row["pair_rows"]
    return {**group, **found, **pairs}
