"""The table of losses: formula, paper, options and needs of each.

Order: options, entries, table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

from torch import Tensor

from . import formulas
from .formulas import Formula, margin_loss

DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


class LossOptions(TypedDict, total=False):
    """Options of losses, as keyword arguments. One that no term of the loss uses is a ValueError; one that is not given
    has the loss's own value (`LOSSES[name].options`).
    """

    label_smoothing: float
    f_divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"]
    f_alpha: float
    token_reduction: Literal["mean", "sum"]
    discopop_tau: float
    gamma: float
    alphapo_alpha: float
    cpo_alpha: float
    unlikelihood_alpha: float
    bco_baseline: Any
    ld_alpha: float
    ld_reference: bool
    wpo: bool


@dataclass(frozen=True, slots=True)
class Option:
    """What an option means and which values it takes."""

    meaning: str
    expected: str
    accepts: Any = None
    """value -> bool"""
    plain: Any = None
    """The value that leaves every loss as it is: no error with a loss that does not use the option."""


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _truth(value: object) -> bool:
    return isinstance(value, bool)


def _unit(value: object) -> bool:
    return is_number(value) and 0 <= value <= 1  # pyright: ignore[reportOperatorIssue]


def _positive(value: object) -> bool:
    return is_number(value) and value > 0  # pyright: ignore[reportOperatorIssue]


def _not_negative(value: object) -> bool:
    return is_number(value) and value >= 0  # pyright: ignore[reportOperatorIssue]


OPTIONS: dict[str, Option] = {
    "label_smoothing": Option(
        "probability that a preference is labelled the wrong way round",
        "0 <= value < 0.5",
        lambda value: _not_negative(value) and value < 0.5,
        plain=0.0,
    ),
    "f_divergence": Option(
        "divergence that holds the policy to the reference",
        f"one of {', '.join(DIVERGENCES)}",
        lambda value: value in DIVERGENCES,
        plain="reverse_kl",
    ),
    "f_alpha": Option(
        "of the alpha divergence: near 0 reverse KL, 1 forward KL",
        "0 < value <= 1",
        lambda value: _positive(value) and value <= 1,
    ),
    "token_reduction": Option(
        "log-probs of a completion as mean over its tokens, or sum",
        "mean or sum",
        lambda value: value in ("mean", "sum"),
    ),
    "discopop_tau": Option("temperature of the blend", "a positive number", _positive),
    "gamma": Option("margin to reach", "zero or more", _not_negative),
    "alphapo_alpha": Option(
        "shape of the reward", "a number other than 0", lambda value: is_number(value) and value != 0
    ),
    "cpo_alpha": Option("weight of the likelihood term", "zero or more", _not_negative),
    "unlikelihood_alpha": Option("weight of the rejected side", "0 <= value <= 1", _unit),
    "bco_baseline": Option(
        "constant taken from every reward", "a number", lambda value: isinstance(value, Tensor) or is_number(value)
    ),
    "ld_alpha": Option(
        "weight of the tokens beyond the shorter completion of a pair", "0 <= value <= 1", _unit, plain=1.0
    ),
    "ld_reference": Option("weigh the reference's tokens too", "True or False", _truth, plain=True),
    "wpo": Option("weigh pairs by how likely the policy is to write them", "True or False", _truth, plain=False),
}

_LD: dict[str, Any] = {"ld_alpha": 1.0, "ld_reference": True}
_WPO: dict[str, Any] = {"wpo": False}
_ANY = _LD | _WPO
_MARGIN: dict[str, Any] = {"f_divergence": "reverse_kl", "f_alpha": 0.5} | _ANY
ROW_OPTIONS = ("ld_alpha", "ld_reference", "wpo")
"""Options of whole calls that need log-probs per token."""


@dataclass(frozen=True, slots=True)
class LossEntry:
    """One loss of the table."""

    formula: Formula
    text: str
    """For people. d: log ratio; lp: the policy's log-prob; n: tokens; r = beta d; s: d, or its f-divergence score."""
    paper: str
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options that the loss uses, with the values they have where they are not given."""
    numbers: tuple[str, ...] = ()
    """The first up to two numbers that its kernel takes."""
    reference: bool = True
    """Of log ratios; else of the policy's log-probs alone."""
    mean: bool = False
    """Divides log-probs by lengths, always."""
    coupled: Literal["batch", "state"] | None = None
    """batch: sorts the batch; state: has a running baseline. Trained through the two-phase form."""
    shift_invariant: bool = False
    """The same when a function of the prompt is added to its rewards (Lemma 1), its options left alone."""

    def uses_lengths(self, options: Mapping[str, Any]) -> bool:
        return self.mean or options.get("token_reduction") == "mean"


_SMOOTHED: dict[str, Any] = {"label_smoothing": 0.0}
_AOT_PAPER = "Melnyk et al. 2024, arXiv:2406.05882"

LOSSES: dict[str, LossEntry] = {
    "sigmoid": LossEntry(
        margin_loss(formulas.sigmoid_shape),
        "-(1-e) log σ(m) - e log σ(-m), m = β(s_w - s_l)",
        "Rafailov et al. 2023, arXiv:2305.18290, eq. 7; e > 0: cDPO, Mitchell 2023",
        _SMOOTHED | _MARGIN,
        numbers=("label_smoothing",),
        shift_invariant=True,
    ),
    "robust": LossEntry(
        margin_loss(formulas.robust_shape),
        "[-(1-e) log σ(m) + e log σ(-m)] / (1-2e)",
        "Chowdhury et al. 2024, arXiv:2403.00409",
        {"label_smoothing": 0.1} | _MARGIN,
        numbers=("label_smoothing",),
        shift_invariant=True,
    ),
    "hinge": LossEntry(
        margin_loss(formulas.hinge_shape),
        "max(0, 1 - m)",
        "Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657",
        _MARGIN,
        shift_invariant=True,
    ),
    "ipo": LossEntry(
        margin_loss(formulas.ipo_shape),
        "(s_w/n_w - s_l/n_l - 1/(2β))², or without n",
        "Azar et al. 2023, arXiv:2310.12036, eq. 17",
        {"token_reduction": "mean"} | _MARGIN,
    ),
    "exo_pair": LossEntry(
        margin_loss(formulas.exo_shape),
        "KL((σ(m), σ(-m)) ‖ (1-e, e))",
        "Ji et al. 2024, arXiv:2402.00856, eq. 16",
        {"label_smoothing": 1e-3} | _MARGIN,
        numbers=("label_smoothing",),
        shift_invariant=True,
    ),
    "nca_pair": LossEntry(
        formulas.nca_pair,
        "-log σ(r_w) - ½ log σ(-r_w) - ½ log σ(-r_l)",
        "Chen et al. 2024, arXiv:2402.05369",
        _ANY,
    ),
    "bco_pair": LossEntry(
        formulas.bco_pair,
        "-log σ(r_w - b) - log σ(b - r_l), b the mean of all rewards so far",
        "Jung et al. 2024, arXiv:2404.04656",
        {"bco_baseline": 0.0} | _ANY,
        numbers=("bco_baseline",),
        coupled="state",
    ),
    "sppo_hard": LossEntry(
        formulas.sppo_hard,
        "(d_w - 1/(2β))² + (d_l + 1/(2β))²",
        "Wu et al. 2024, arXiv:2405.00675, eq. 4.7",
        _ANY,
    ),
    "apo_zero": LossEntry(
        formulas.apo_zero,
        "1 - σ(r_w) + σ(r_l)",
        "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7",
        _ANY,
    ),
    "apo_down": LossEntry(
        formulas.apo_down,
        "σ(r_w) + 1 - σ(r_w - r_l)",
        "D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8",
        _ANY,
    ),
    "discopop": LossEntry(
        margin_loss(formulas.discopop_shape),
        "-(1-k) log σ(m) + k e^-m, k = σ(m/τ)",
        "Lu et al. 2024, arXiv:2406.08414, eq. 5",
        {"discopop_tau": 0.05} | _MARGIN,
        numbers=("discopop_tau",),
        shift_invariant=True,
    ),
    "aot": LossEntry(
        formulas.aot,
        "sigmoid of m_k = β(u_(k) - v_(k)): u = lp_w - lp_l and v = ref_w - ref_l, each sorted over the batch",
        _AOT_PAPER,
        _SMOOTHED | _LD,
        coupled="batch",
        shift_invariant=True,
    ),
    "aot_unpaired": LossEntry(
        formulas.aot_unpaired,
        "sigmoid of m_k = β(d_w(k) - d_l(k)), each side sorted over the batch",
        _AOT_PAPER,
        _SMOOTHED | _LD,
        coupled="batch",
    ),
    "sigmoid_norm": LossEntry(
        margin_loss(formulas.sigmoid_shape, mean=True),
        "sigmoid of m = β(s_w/n_w - s_l/n_l)",
        "Lambert et al. 2024 (Tülu 3), arXiv:2411.15124",
        _SMOOTHED | _MARGIN,
        numbers=("label_smoothing",),
        mean=True,
    ),
    "simpo": LossEntry(
        formulas.simpo,
        "sigmoid of m = β(lp_w/n_w - lp_l/n_l) - γ",
        "Meng et al. 2024, arXiv:2405.14734, eq. 6",
        {"gamma": 0.5} | _SMOOTHED | _WPO,
        numbers=("label_smoothing", "gamma"),
        reference=False,
        mean=True,
    ),
    "alphapo": LossEntry(
        formulas.alphapo,
        "-log σ(β(a_w - a_l) - γ), a = (1 - e^(-α lp/n)) / α",
        "Gupta et al. 2025, arXiv:2501.03884",
        {"gamma": 0.5, "alphapo_alpha": 0.25} | _WPO,
        numbers=("alphapo_alpha", "gamma"),
        reference=False,
        mean=True,
    ),
    "orpo": LossEntry(
        formulas.orpo,
        "-x_w - β log σ(o_w - o_l), x = lp/n, o = x - log(1 - e^x)",
        "Hong et al. 2024, arXiv:2403.07691, eq. 6; its λ is β",
        _WPO,
        reference=False,
        mean=True,
    ),
    "cpo": LossEntry(
        formulas.cpo,
        "sigmoid of m = β(lp_w - lp_l), less α lp_w/n_w",
        "Xu et al. 2024, arXiv:2401.08417",
        {"cpo_alpha": 1.0, "token_reduction": "mean"} | _SMOOTHED | _WPO,
        numbers=("label_smoothing", "cpo_alpha"),
        reference=False,
    ),
    "unlikelihood": LossEntry(
        formulas.unlikelihood,
        "-lp_w + α lp_l",
        "Rafailov et al. 2023, section 6; Welleck et al. 2019, arXiv:1908.04319",
        {"unlikelihood_alpha": 1.0, "token_reduction": "sum"} | _WPO,
        numbers=("unlikelihood_alpha",),
        reference=False,
    ),
    "sft": LossEntry(
        formulas.sft,
        "-lp_w/n_w",
        "Preferred-FT of Rafailov et al. 2023, section 6; as a term: Pang et al. 2024, arXiv:2404.19733",
        {"token_reduction": "mean"} | _WPO,
        reference=False,
    ),
}

KERNEL_IDS = {name: k for k, name in enumerate(k for k, entry in LOSSES.items() if entry.coupled != "batch")}
"""The constant that selects each loss in a kernel; those that sort the batch run on torch."""
