"""Every loss with every option, and numbers to try them on. C completions, T pairs."""

from typing import Any, NamedTuple

import torch
from dpo_kernels import LOSSES, PairCall
from torch import Tensor

VALUES: dict[str, list[Any]] = {
    "label_smoothing": [0.3],
    "f_divergence": ["forward_kl", "js", "alpha"],
    "token_reduction": ["mean", "sum"],
    "discopop_tau": [0.5],
    "gamma": [0.0, 1.4],
    "alphapo_alpha": [-0.4, 0.9],
    "cpo_alpha": [0.0, 0.3],
    "unlikelihood_alpha": [0.0, 0.4],
    "bco_baseline": [-0.7],
}
"""Other values of the options than those that a loss has anyway."""

SUMS: list[tuple[str, dict[str, Any]]] = [
    ("sigmoid:1,sft:0.1", {}),
    ("sigmoid:0.8,bco_pair:0.2,sft:1", {"token_reduction": "sum", "label_smoothing": 0.1}),
    ("ipo,hinge:0.5", {"f_divergence": "alpha", "f_alpha": 0.8, "token_reduction": "sum"}),
    ("simpo:2,cpo:0.5", {"label_smoothing": 0.2}),
]


def _cases() -> list[tuple[str, dict[str, Any]]]:
    cases: list[tuple[str, dict[str, Any]]] = []
    for name, entry in LOSSES.items():
        cases.append((name, {}))
        for option, values in VALUES.items():
            if option in entry.options:
                cases += [(name, {option: value}) for value in values if value != entry.options[option]]
        if "f_divergence" in entry.options:
            cases.append((name, {"f_divergence": "alpha", "f_alpha": 0.9}))
    return cases + SUMS


CASES = _cases()


def label(case: Any) -> str:
    """For pytest's ids."""
    if isinstance(case, tuple):
        name, options = case
        return " ".join([name, *(f"{key}={value}" for key, value in options.items())])
    return str(case)


class Problem(NamedTuple):
    """Completions whose margins are within a few units, each in several pairs; float64."""

    policy: Tensor
    ref: Tensor
    lengths: Tensor
    chosen: Tensor
    rejected: Tensor
    weights: Tensor
    upstream: Tensor

    def arguments(self, loss: str, options: dict[str, Any]) -> dict[str, Any]:
        """ref_logps and lengths where the loss takes them, and its options."""
        call = PairCall.check(loss, 0.1, "mean", **options)
        return {
            "ref_logps": self.ref if call.reference else None,
            "lengths": self.lengths if call.lengths else None,
            **options,
        }


def problem(completions: int = 8, pairs: int = 11, *, seed: int = 0, spread: float = 3.0) -> Problem:
    maker = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=maker, dtype=torch.float64)

    lengths = torch.randint(4, 30, (completions,), generator=maker)
    policy = -lengths * (0.3 + draw(completions).abs())
    chosen = torch.randint(completions, (pairs,), generator=maker)
    rejected = (chosen + torch.randint(1, max(2, completions), (pairs,), generator=maker)) % completions
    weights = torch.rand(pairs, generator=maker, dtype=torch.float64)
    return Problem(policy, policy + spread * draw(completions), lengths, chosen, rejected, weights, draw(pairs))
