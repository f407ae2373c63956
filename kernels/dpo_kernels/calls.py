"""One call's choice out of the table of losses: its terms, their options resolved, and what they need together.

A loss is named as "sigmoid", or as a weighted sum "sigmoid:1,sft:0.1". Order: terms, the call, parsing and checks.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .losses import DIVERGENCES, KERNEL_IDS, LOSSES, OPTIONS, ROW_OPTIONS, LossEntry, is_number

REDUCTIONS = ("mean", "sum", "none")
NUMBERS_A_TERM = 4
"""Of `PairCall.numbers`."""


@dataclass(frozen=True, slots=True)
class Term:
    """One loss of a weighted sum, its options resolved."""

    name: str
    weight: float
    options: tuple[tuple[str, Any], ...]

    @property
    def entry(self) -> LossEntry:
        return LOSSES[self.name]

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.options)

    @property
    def lengths(self) -> bool:
        return self.entry.uses_lengths(self.values)


@dataclass(frozen=True, slots=True)
class PairCall:
    """The non-tensor arguments of one call."""

    terms: tuple[Term, ...]
    beta: float
    reduction: str
    ld_alpha: float = 1.0
    ld_reference: bool = True
    wpo: bool = False

    @classmethod
    def check(cls, loss: str, beta: float, reduction: str, **options: Any) -> "PairCall":
        """Refuses an unknown loss, and any option that none of its terms uses, by name. None stands for not given."""
        if not is_number(beta) or not beta > 0:
            raise ValueError(f"beta: expected a number above 0, found {beta}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, found {reduction!r}")
        parts = parse_loss(loss)
        given = {name: value for name, value in options.items() if value is not None}
        _check_options(loss, [name for name, _ in parts], given)
        terms = []
        for name, weight in parts:
            values = {key: given.get(key, value) for key, value in LOSSES[name].options.items()}
            if name == "exo_pair" and values["label_smoothing"] == 0:
                raise ValueError("label_smoothing: loss 'exo_pair' expected 0 < value < 0.5, found 0")
            terms.append(Term(name, weight, tuple(values.items())))
        if reduction == "none" and any(LOSSES[name].coupled == "batch" for name, _ in parts):
            raise ValueError(f"reduction: loss {loss!r} sorts the pairs; expected mean or sum, found 'none'")
        rows = {key: given[key] for key in ROW_OPTIONS if key in given}
        return cls(tuple(terms), beta, reduction, **rows)

    @property
    def name(self) -> str:
        return self.terms[0].name if len(self.terms) == 1 else ",".join(f"{t.name}:{t.weight:g}" for t in self.terms)

    @property
    def reference(self) -> bool:
        """Whether any term is of log ratios."""
        return any(term.entry.reference for term in self.terms)

    @property
    def lengths(self) -> bool:
        """Whether any term divides by lengths."""
        return any(term.lengths for term in self.terms)

    @property
    def coupled(self) -> str | None:
        """batch or state where a term needs the two-phase form."""
        kinds = [term.entry.coupled for term in self.terms if term.entry.coupled]
        return kinds[0] if kinds else None

    @property
    def mean_rewards(self) -> bool:
        """Rewards are beta times log ratios; without a reference log-probs, over lengths where the loss has it so."""
        return not self.reference and self.terms[0].entry.mean

    @property
    def rows(self) -> bool:
        """Whether log-probs per token are needed, not only their sums."""
        return self.ld_alpha != 1.0 or self.wpo

    @property
    def in_kernel(self) -> bool:
        """Whether one Triton kernel computes it."""
        return all(t.name in KERNEL_IDS and is_number(t.values.get("bco_baseline", 0.0)) for t in self.terms)

    @property
    def codes(self) -> list[int]:
        """Of each term 8 * loss + 2 * divergence + whether it divides by lengths, as the kernels take them."""
        kinds = [DIVERGENCES.index(term.values.get("f_divergence", DIVERGENCES[0])) for term in self.terms]
        terms = zip(self.terms, kinds, strict=True)
        return [8 * KERNEL_IDS[term.name] + 2 * kind + term.lengths for term, kind in terms]

    @property
    def numbers(self) -> list[float]:
        """Of each term: weight, its first and second number, alpha of its divergence."""
        flat: list[float] = []
        for term in self.terms:
            own = [float(term.values[name]) for name in term.entry.numbers]
            flat += [term.weight, *own, *[0.0] * (2 - len(own)), float(term.values.get("f_alpha", 0.0))]
        return flat


def parse_loss(loss: str) -> list[tuple[str, float]]:
    """("sigmoid:1,sft:0.1") -> [("sigmoid", 1.0), ("sft", 0.1)]. A weight of 1 may be left out."""
    parts: list[tuple[str, float]] = []
    for part in str(loss).split(","):
        name, colon, weight = part.strip().partition(":")
        name = name.strip()
        if name not in LOSSES:
            raise ValueError(
                f"loss: expected one of {', '.join(LOSSES)}, or a sum as sigmoid:1,sft:0.1, found {loss!r}"
            )
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ValueError(f"loss: expected a weight above 0 after {name}:, found {weight!r}")
        if name in dict(parts):
            raise ValueError(f"loss: expected every loss once, found {name} twice")
        parts.append((name, value))
    return parts


def _check_options(loss: str, names: list[str], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        option = OPTIONS.get(key)
        if option is None:
            raise ValueError(f"{key}: expected an option of a loss ({', '.join(OPTIONS)}), found {value!r}")
        if not option.accepts(value):
            raise ValueError(f"{key}: expected {option.expected}, found {value}")
        users = [name for name in names if key in LOSSES[name].options]
        plain = option.plain is not None and value == option.plain
        sorted_pairs = key == "wpo" and any(LOSSES[name].coupled == "batch" for name in names)
        if (sorted_pairs or not users) and not plain:
            raise ValueError(f"{key}: loss {loss!r} does not use it; expected none, found {value}")
    if "f_alpha" in given and given.get("f_divergence") != "alpha":
        raise ValueError(f"f_alpha: expected with f_divergence 'alpha' alone, found {given['f_alpha']}")
    if "ld_reference" in given and not given["ld_reference"] and given.get("ld_alpha", 1.0) == 1.0:
        raise ValueError("ld_reference: expected with ld_alpha below 1 alone, found False")
