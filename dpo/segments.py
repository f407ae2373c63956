"""The layout object that travels to every attention layer: which rows of a packed row attend to which.

Queries are rows [q_start, q_stop); their keys are rows [prefix_start, prefix_stop) and then rows [q_start, q_stop),
causal and aligned at the bottom right: query i of a segment sees all of the prefix and the segment's own rows up to i.
For a group [prompt | y_1 | ... | y_K] the segments are prompt + y_1 with no prefix, and y_2 .. y_K with the prompt as
prefix.

Shapes: M segments, S packed tokens (queries), L keys of all segments together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Segments:
    """Attention tables of one packed row.

    q_start, q_stop, prefix_start, prefix_stop: M integers each; the q ranges are adjacent and cover the row.
    cu_seqlens_q, cu_seqlens_k: [M + 1] int32 offsets of the segments among queries and among gathered keys. key_index:
    [L] int64, the row of each gathered key. own_key: [S] int64, where in key_index a row stands as a key of its own
    segment. extra_keys: [E] int64, where the further copies of prompt rows stand in key_index; extra_rows: [E] int64,
    their rows. They are sorted in rounds (sizes in `rounds`): round r holds the copy number r of every prompt that has
    so many, so that no row comes twice in a round and a sum over rounds is deterministic. max_q, max_k: the longest
    segment, in queries and in keys.
    """

    q_start: tuple[int, ...]
    q_stop: tuple[int, ...]
    prefix_start: tuple[int, ...]
    prefix_stop: tuple[int, ...]
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor
    own_key: Tensor
    extra_keys: Tensor
    extra_rows: Tensor
    rounds: tuple[int, ...]
    max_q: int
    max_k: int
    cache: dict[Any, Any] = field(default_factory=dict, repr=False)
    """Scratch of the attention backends (masks, built once a batch and not once a layer); neither pickled nor
    copied."""

    @classmethod
    def build(
        cls, q_start: Sequence[int], q_stop: Sequence[int], prefix_start: Sequence[int], prefix_stop: Sequence[int]
    ) -> Segments:
        """Derive the tables from the ranges. Raises ValueError when the q ranges do not cover the row in order."""
        starts, stops, prefix_starts, prefix_stops = (
            np.asarray(x, dtype=np.int64) for x in (q_start, q_stop, prefix_start, prefix_stop)
        )
        if starts[0] != 0 or (starts[1:] != stops[:-1]).any() or (stops <= starts).any():
            raise ValueError(
                f"q_start, q_stop: expected adjacent ranges from row 0, found {list(q_start)}, {list(q_stop)}"
            )
        queries, prefixes = stops - starts, prefix_stops - prefix_starts
        keys = queries + prefixes
        key_ends = np.cumsum(keys)
        key_starts = key_ends - keys
        # keys of a segment: its prefix, then its own rows
        key_index = np.empty(key_ends[-1], dtype=np.int64)
        own_key = ranges(key_starts + prefixes, queries)
        key_index[own_key] = np.arange(stops[-1])
        copies = np.nonzero(prefixes)[0]
        order, sizes = _rounds(prefix_starts[copies], prefixes[copies])
        copies = copies[order]
        extra_keys = ranges(key_starts[copies], prefixes[copies])
        extra_rows = ranges(prefix_starts[copies], prefixes[copies])
        key_index[extra_keys] = extra_rows
        return cls(
            q_start=tuple(starts.tolist()),
            q_stop=tuple(stops.tolist()),
            prefix_start=tuple(prefix_starts.tolist()),
            prefix_stop=tuple(prefix_stops.tolist()),
            cu_seqlens_q=torch.from_numpy(np.concatenate([[0], stops]).astype(np.int32)),
            cu_seqlens_k=torch.from_numpy(np.concatenate([[0], key_ends]).astype(np.int32)),
            key_index=torch.from_numpy(key_index),
            own_key=torch.from_numpy(own_key),
            extra_keys=torch.from_numpy(extra_keys),
            extra_rows=torch.from_numpy(extra_rows),
            rounds=sizes,
            max_q=int(queries.max()),
            max_k=int(keys.max()),
        )

    @property
    def shares(self) -> bool:
        """Whether any segment has a prefix (if none has, keys are the rows themselves and nothing is gathered)."""
        return bool(self.rounds)

    def map(self, function: Callable[[Tensor], Tensor]) -> Segments:
        """The same tables with `function` applied to every tensor, and an empty cache."""
        changed = {name: function(value) for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        return replace(self, **changed, cache={})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cache": {}}


def _rounds(prefix_starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """Order of the segments with a prefix by round, and the number of rows in each round."""
    if prefix_starts.size == 0:
        return np.empty(0, dtype=np.int64), ()
    seen: dict[int, int] = {}
    round_of = np.empty(prefix_starts.size, dtype=np.int64)
    for index, start in enumerate(prefix_starts.tolist()):
        round_of[index] = seen[start] = seen.get(start, -1) + 1
    order = np.argsort(round_of, kind="stable")
    return order, tuple(int(lengths[round_of == r].sum()) for r in range(round_of.max() + 1))


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenation of arange(start, start + length)."""
    if starts.size == 0:
        return np.empty(0, dtype=np.int64)
    ends = np.cumsum(lengths)
    return np.arange(ends[-1], dtype=np.int64) + np.repeat(starts - (ends - lengths), lengths)
