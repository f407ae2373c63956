"""`dpo losses`: the table of losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_kernels import LOSSES, LossEntry
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dpo.commands import LossesConfig
from dpo.console import console, say
from dpo.lossflags import LossFlags

_RANKING = (
    "--comparisons ranking",
    "-Σ_k [r_τ(k) - log Σ_{j≥k} e^r_τ(j)]",
    "--ranking-top-k",
    "reference, rankings",
    "Plackett-Luce: Rafailov et al. 2023, arXiv:2305.18290, A.3",
)
_SYMBOLS = (
    "w, l: chosen, rejected. lp: log-prob of a completion, n: its tokens, d = lp - ref: log ratio, r = βd: reward. "
    "s: d, or its score under --f-divergence. m = β(s_w - s_l). e: --label-smoothing. σ: sigmoid."
)
_NARROWEST = 150


def needs_of(entry: LossEntry) -> list[str]:
    """What a loss needs besides the policy's log-probs."""
    needs = ["reference"] if entry.reference else []
    if entry.mean or "token_reduction" in entry.options:
        needs.append("lengths")
    if entry.coupled is not None:
        needs.append({"batch": "the whole step", "state": "a running baseline"}[entry.coupled])
    return needs


def flags_of(options: Mapping[str, Any]) -> list[str]:
    """Options of one loss as flags with the values they have where they are not given, words held together."""
    shown = {"bco_baseline": "running", "ld_reference": None, "wpo": None}
    parts = []
    for name, value in options.items():
        value = shown.get(name, value)
        parts.append("--" + name.replace("_", "-") + ("" if value is None else f"\N{NO-BREAK SPACE}{value}"))
    return parts


def print_losses(config: LossesConfig) -> None:
    """Prints the losses that were asked for.

    Raises:
        UserError: an unknown loss.
    """
    names = list(LOSSES)
    if config.loss is not None:
        names = [term.name for term in LossFlags(loss=config.loss).pair_call().terms]
    out = Table(title="losses of dpo train --loss", title_justify="left", show_lines=True)
    for column in ("loss", "formula", "options, as they are without the flag", "needs", "paper"):
        out.add_column(column, overflow="fold", max_width=18 if column == "needs" else None)

    def add(*cells: str) -> None:
        out.add_row(*map(Text, cells))  # brackets would be markup

    for name in names:
        entry = LOSSES[name]
        add(name, entry.text, ", ".join(flags_of(entry.options)), ", ".join(needs_of(entry)), entry.paper)
    if config.loss is None:
        add(*_RANKING)
    wide = console if console.width >= _NARROWEST else Console(width=_NARROWEST, highlight=False)
    wide.print(out)
    say(_SYMBOLS)
