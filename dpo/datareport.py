"""What became of the rows of one source: counts, reasons with the first rows, and the lines that tell a person."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dpo.chat import BadRow
from dpo.comparisons import NoComparison
from dpo.errors import UserError
from dpo.tokenize import Limits

FIRST_ROWS = 5


@dataclass
class Dropped:
    """Rows dropped for one reason: how many, whether they are bad data (else they only compare nothing), the first row
    numbers, and what was found in the first."""

    count: int = 0
    bad: bool = True
    first_rows: list[int] = field(default_factory=list)
    detail: str = ""

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.first_rows)) + (", .." if self.count > len(self.first_rows) else "")
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.count} (row{'s' if self.count > 1 else ''} {rows}{detail})"


@dataclass
class DataReport:
    """Counts of one `load_preferences`.

    source: how messages name it. format: the format recognised. rows: read. groups, pairs, completions: kept. dropped:
    rows by reason. pairs_dropped: pairs of kept rows, by reason. ties, close: comparisons left out for equal scores,
    and for scores closer than the minimum gap. rankings: kept, with `tied_rankings` averaged over the orders of ties.
    merged: rows that went into the group of an earlier row with the same prompt; repeated: completions found in them
    that the group had. cut_at_eos: completions that had text after an end-of-sequence. longest_prompt,
    longest_completion: tokens, after truncation.
    """

    source: str
    format: str
    limits: Limits = field(default_factory=Limits)
    rows: int = 0
    groups: int = 0
    pairs: int = 0
    completions: int = 0
    dropped: dict[str, Dropped] = field(default_factory=dict)
    pairs_dropped: Counter[str] = field(default_factory=Counter)
    ties: int = 0
    close: int = 0
    rankings: int = 0
    tied_rankings: int = 0
    merged: int = 0
    repeated: int = 0
    truncated_prompts: int = 0
    truncated_completions: int = 0
    cut_at_eos: int = 0
    longest_prompt: int = 0
    longest_completion: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def bad_rows(self) -> int:
        return sum(dropped.count for dropped in self.dropped.values() if dropped.bad)

    def drop(self, row: int, bad: BadRow) -> None:
        kind = Dropped(bad=not isinstance(bad, NoComparison), detail=bad.detail)
        dropped = self.dropped.setdefault(bad.reason, kind)
        dropped.count += 1
        if len(dropped.first_rows) < FIRST_ROWS:
            dropped.first_rows.append(row)

    def count(self, pairs: int, completions: int, prompt_length: int, completion_length: int) -> None:
        self.groups += 1
        self.pairs += pairs
        self.completions += completions
        self.longest_prompt = max(self.longest_prompt, prompt_length)
        self.longest_completion = max(self.longest_completion, completion_length)

    def check(self, max_bad_fraction: float) -> None:
        """Raise UserError when too many rows, or all of them, could not be used."""
        if self.bad_rows <= max_bad_fraction * self.rows and self.groups:
            return
        expected = (
            f"at most a fraction of {max_bad_fraction:g} (--max-bad-fraction)"
            if self.groups
            else "at least one usable row"
        )
        raise UserError(
            f"{self.source}, read as {self.format}: expected {expected}; "
            f"found {self._unused(self.groups > 0)} of {self.rows} rows that cannot be used: {self._reasons()}"
        )

    def lines(self) -> list[str]:
        """Notices for a person, a line each; the first says what was recognised and kept, the others only what is worth
        saying."""
        lines = [
            f"{self.source}: {self.format}; {self.rows} rows, {self.groups} prompts, {self._comparisons()}, "
            f"{self.completions} completions; longest prompt {self.longest_prompt}, completion "
            f"{self.longest_completion} tokens"
        ]
        if self.dropped:
            lines.append(f"dropped {self._unused()} of {self.rows} rows: {self._reasons()}")
        if self.pairs_dropped:
            lines.append(
                "dropped pairs of other rows: "
                + "; ".join(f"{reason} {n}" for reason, n in sorted(self.pairs_dropped.items()))
            )
        if self.merged:
            lines.append(
                f"merged {self.merged} rows into the group of an earlier row with the same prompt; "
                f"{self.repeated} of their completions were there already and are computed once"
            )
        if self.tied_rankings:
            lines.append(f"averaged {self.tied_rankings} rankings over the orders of equal scores")
        elif self.ties:
            lines.append(f"left out {self.ties} pairs of equal score")
        if self.close:
            lines.append(f"left out {self.close} pairs closer than the minimum gap")
        if self.truncated_prompts:
            lines.append(f"truncated {self.truncated_prompts} prompts from the left, to {self.limits.prompt} tokens")
        if self.truncated_completions:
            lines.append(
                f"truncated {self.truncated_completions} completions from the right; they get no end-of-sequence"
            )
        if self.cut_at_eos:
            lines.append(f"cut {self.cut_at_eos} completions at an end-of-sequence inside them")
        return lines + self.notes

    def _comparisons(self) -> str:
        return f"{self.rankings} rankings ({self.pairs} pairs)" if self.rankings else f"{self.pairs} pairs"

    def _unused(self, only_bad: bool = False) -> int:
        return sum(dropped.count for dropped in self.dropped.values() if dropped.bad or not only_bad)

    def _reasons(self) -> str:
        ordered = sorted(self.dropped.items(), key=lambda item: -item[1].count)
        return "; ".join(f"{reason} {dropped}" for reason, dropped in ordered)
