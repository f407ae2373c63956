"""The running baseline of bco_pair: state of a loss, which goes into checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class RunningBaseline:
    """Mean of all rewards of all steps so far, chosen and rejected, on the device; nothing here waits for it.

    The reward shift of Jung et al. 2024 (arXiv:2404.04656), (E[r_w] + E[r_l]) / 2, with the mean over all of training
    in place of the expectation. 0 before the first step.
    """

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        """[sum of rewards, their number]"""

    @property
    def mean(self) -> Tensor:
        """A float64 scalar."""
        return self._sums[0] / self._sums[1].clamp(min=1)

    def update(self, rewards: Tensor) -> None:
        """Takes in a step's rewards; those that are not finite are left out."""
        finite = rewards.isfinite()
        self._sums += torch.stack([rewards.double().where(finite, 0.0).sum(), finite.sum().double()])

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"sums": self._sums.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        """Goes on from a checkpoint, bit by bit."""
        self._sums.copy_(state_dict["sums"])
