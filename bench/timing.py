"""Interleaved timing of sides that do the same steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any, Protocol


class TimedSide(Protocol):
    """A side that can be told to do step I and says how long it took."""

    name: str

    def ask(self, command: str) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Timings:
    """Seconds of one side, by step and round."""

    seconds: list[list[float]]

    @property
    def minimum(self) -> float:
        """Seconds a step: the least of the rounds for each step, averaged over steps."""
        return mean(min(rounds) for rounds in self.seconds)

    @property
    def median(self) -> float:
        """Seconds a step: the median of the rounds for each step, averaged over steps."""
        return mean(median(rounds) for rounds in self.seconds)


def interleave(
    sides: Sequence[TimedSide], steps: int, rounds: int, *, warmup_steps: int
) -> tuple[dict[str, Timings], dict[str, list[Any]]]:
    """Time every side on steps 0 .. `steps` - 1, sides taking turns within a step, the order rotating between steps.

    Returns seconds by side, and what the sides answered, warm-up included, in order: all see the same steps in the same
    order.
    """
    seconds: dict[str, list[list[float]]] = {side.name: [[] for _ in range(steps)] for side in sides}
    answers: dict[str, list[Any]] = {side.name: [] for side in sides}
    schedule = [(index, False) for index in range(min(warmup_steps, steps))]
    schedule += [(index, True) for _ in range(rounds) for index in range(steps)]
    for turn, (index, timed) in enumerate(schedule):
        for offset in range(len(sides)):
            side = sides[(turn + offset) % len(sides)]
            answer = side.ask(f"step {index}")
            answers[side.name].append(answer["result"])
            if timed:
                seconds[side.name][index].append(answer["seconds"])
    return {name: Timings(table) for name, table in seconds.items()}, answers
