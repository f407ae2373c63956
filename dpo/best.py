"""The best evaluation so far, and when to stop for want of a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class BestEvaluation:
    """Follows one metric of the evaluations. The one before training does not count: it has no checkpoint."""

    def __init__(self, metric: str | None, patience: int | None = None) -> None:
        self.metric, self.patience = metric, patience
        self.step: int | None = None
        self.value = math.nan
        self.not_better = 0

    def take(self, step: int, means: Mapping[str, float]) -> bool:
        """Takes the evaluation after `step` updates; returns whether it is the best so far. NaN never is."""
        if self.metric is None or step == 0:
            return False
        value = means[self.metric]
        if math.isnan(value) or (self.step is not None and not self._beats(value)):
            self.not_better += 1
            return False
        self.step, self.value, self.not_better = step, value, 0
        return True

    def _beats(self, value: float) -> bool:
        return value < self.value if self.metric == "loss" else value > self.value

    @property
    def stop(self) -> bool:
        """Whether `patience` evaluations in a row were not better."""
        return self.patience is not None and self.not_better >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "value": self.value, "not_better": self.not_better}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.value, self.not_better = state["step"], state["value"], state["not_better"]
