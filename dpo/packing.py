"""Packing: preference groups to the flat tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Group:
    """One prompt with its completions and the preference pairs among them.

    prompt: token ids, at least one. completions: K lists of token ids, each with its end-of-sequence and none empty.
    pairs: (chosen, rejected), indices into `completions`. row: where the group came from, for error messages.
    """

    prompt: Sequence[int]
    completions: Sequence[Sequence[int]]
    pairs: Sequence[tuple[int, int]]
    row: int | str = -1
