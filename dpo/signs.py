"""Signs that preference training is going wrong, seen in the records of its steps, each told once with what to do.

Values are means over a window of the newest steps, weighted by pairs; updates that were skipped do not count. The
thresholds are the constants below; dpo/README.md lists them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

WINDOW_STEPS, WINDOW_PAIRS = 10, 64
"""A window is the newest steps, at least so many and with at least so many pairs."""
CHOSEN_FALLING = -0.1
"""Log ratio of chosen completions, nats a token: their tokens lost a tenth of their probability on average."""
MARGIN_EXPLODING = 10.0
"""A pair's loss is below 5e-5 there, and its margin is 10 / beta nats away from the reference."""
STUCK, STUCK_MARGIN, STUCK_STEPS = 0.005, 0.02, 30
"""Loss within so much of ln 2 and margin within so much of 0 after so many steps at half the learning rate or more."""
LENGTH_BIAS, LENGTH_MARGIN = 0.5, 0.05
"""Correlation of reward and length within pairs, once margins are that far from 0 on average (root mean square)."""


@dataclass(frozen=True)
class Sign:
    """One warning. `value` passed `threshold`; `step` counts the updates before it was seen."""

    step: int
    sign: str
    value: float
    threshold: float
    message: str
    advice: str

    def record(self) -> dict[str, Any]:
        """The line of warnings.jsonl."""
        return asdict(self)

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}. {self.advice}"


class Signs:
    """Watches the records of metrics.jsonl; gives each sign at most once a run."""

    def __init__(self, *, beta: float, lr: float, has_reference: bool = True) -> None:
        self.beta, self.lr, self.has_reference = beta, lr, has_reference
        self.window: deque[Mapping[str, Any]] = deque()
        self.told: set[str] = set()
        self.starts_at_ln2 = False
        self.steps_at_work = 0

    def replay(self, metrics: Iterable[Mapping[str, Any]], warnings: Iterable[Mapping[str, Any]]) -> None:
        """Takes over what a run that goes on has seen and told."""
        for record in metrics:
            self._take(record)
        self.told.update(warning["sign"] for warning in warnings)

    def see(self, record: Mapping[str, Any]) -> list[Sign]:
        """Takes one step's record; returns the signs that it completes."""
        if not self._take(record) or len(self.window) < WINDOW_STEPS or self._pairs() < WINDOW_PAIRS:
            return []
        step = int(record["step"])
        found = (self._chosen_falling(step), self._exploding(step), self._stuck(step), self._length_bias(step))
        new = [sign for sign in found if sign is not None and sign.sign not in self.told]
        self.told.update(sign.sign for sign in new)
        return new

    def _take(self, record: Mapping[str, Any]) -> bool:
        if record.get("skipped") or record["loss"] is None or not math.isfinite(record["loss"]):
            return False
        if record["step"] == 0:
            self.starts_at_ln2 = abs(record["loss"] - math.log(2)) < 1e-3
        self.steps_at_work += record["lr"] >= 0.5 * self.lr
        self.window.append(record)
        while len(self.window) > WINDOW_STEPS and self._pairs() - self.window[0]["pairs"] >= WINDOW_PAIRS:
            self.window.popleft()
        return True

    def _pairs(self) -> int:
        return sum(record["pairs"] for record in self.window)

    def _mean(self, name: str) -> float:
        return sum(record[name] * record["pairs"] for record in self.window) / self._pairs()

    def _chosen_falling(self, step: int) -> Sign | None:
        value = self._mean("chosen_reward") / self.beta / max(self._mean("chosen_tokens"), 1.0)
        if not self.has_reference or value >= CHOSEN_FALLING:
            return None
        return Sign(
            step,
            "chosen log-probs falling",
            value,
            CHOSEN_FALLING,
            f"chosen completions became less likely, by {-value:.2f} nats a token on average",
            "The margin grows at the expense of both sides: lower --lr, raise --beta, or stop earlier (--max-steps); "
            "look at samples",
        )

    def _exploding(self, step: int) -> Sign | None:
        value = self._mean("margin")
        if value <= MARGIN_EXPLODING:
            return None
        return Sign(
            step,
            "margins exploding",
            value,
            MARGIN_EXPLODING,
            f"margins of {value:.1f} on average: the policy is {value / self.beta:.0f} nats from the reference and the "
            "loss no longer tells pairs apart",
            "Lower --lr, raise --beta or --label-smoothing, take fewer --epochs, and trust held-out pairs only",
        )

    def _stuck(self, step: int) -> Sign | None:
        off = abs(self._mean("loss") - math.log(2))
        waiting = self.steps_at_work < STUCK_STEPS or not self.starts_at_ln2
        if waiting or off >= STUCK or abs(self._mean("margin")) >= STUCK_MARGIN:
            return None
        return Sign(
            step,
            "loss stuck at ln 2",
            off,
            STUCK,
            f"the loss is still {self._mean('loss'):.4f}, ln 2 is 0.6931: nothing is learned",
            "Raise --lr (and see --warmup-steps); compare --dtype bf16 with fp32; check that the labels are not random",
        )

    def _length_bias(self, step: int) -> Sign | None:
        value = self._mean("length_correlation")
        spread = math.sqrt(self._mean("margin_squared"))
        if abs(value) <= LENGTH_BIAS or spread < LENGTH_MARGIN:
            return None
        chosen, rejected = self._mean("chosen_tokens"), self._mean("rejected_tokens")
        return Sign(
            step,
            "length bias",
            value,
            math.copysign(LENGTH_BIAS, value),
            f"rewards go with length (correlation {value:+.2f} within pairs); chosen completions have {chosen:.0f} "
            f"tokens, rejected ones {rejected:.0f}",
            "Balance lengths in --data, or bound them (--max-completion-length); compare --eval-data of equal lengths",
        )
