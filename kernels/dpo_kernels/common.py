"""What every function here shares: how logits become a distribution, dtypes, and checks of arguments.

Shapes: N rows, V vocabulary, H hidden, C completions, T pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
STATS = ("entropy", "max_is_target", "mean_logit", "log_sum_sq")


@dataclass(frozen=True, slots=True)
class LogitOptions:
    """x = cap(logit_scale * z) / temperature, with cap(u) = softcap * tanh(u / softcap); p = softmax(x)."""

    ignore_index: int = -100
    """A row whose target is this gives 0, is not read, and gets no gradient."""
    temperature: float = 1.0
    """Divides the logits last."""
    logit_scale: float = 1.0
    """Multiplies the logits first (Cohere, Granite)."""
    softcap: float | None = None
    """Bound of the soft cap (Gemma-2), or None."""

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature: expected a number above 0, found {self.temperature}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected a number above 0 or None, found {self.softcap}")

    @property
    def slope(self) -> float:
        """dx/dz where there is no soft cap."""
        return self.logit_scale / self.temperature


class TokenStats(NamedTuple):
    """What `stats=` asked for, beside the log-probs; None where it was not asked for. No gradient but through `logps`.

    With p = softmax(x) of a row: entropy -sum p log p (nats); max_is_target whether the target has the largest x;
    mean_logit the mean of x over V; log_sum_sq log sum p^2 (WPO's weight). Ignored rows hold 0 (False).
    """

    logps: Tensor
    entropy: Tensor | None = None
    max_is_target: Tensor | None = None
    mean_logit: Tensor | None = None
    log_sum_sq: Tensor | None = None


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 where any input is float64, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def check_stats(stats: Sequence[str]) -> tuple[str, ...]:
    if isinstance(stats, str) or any(name not in STATS for name in stats):
        raise ValueError(f"stats: expected names out of {', '.join(STATS)}, found {stats!r}")
    return tuple(stats)


def check_float(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a floating-point tensor, found {found}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {list(shape)} ({meaning}), found {list(value.shape)}")


def check_index(name: str, value: Tensor, upper: int | None, *, lower: int = 0, allow: int | None = None) -> Tensor:
    """`value` as int64. On CPU, entries are checked against [lower, upper) (or `allow`); elsewhere that would block."""
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected an integer tensor, found {found}")
    value = value.long()
    if value.device.type == "cpu" and upper is not None and not torch.compiler.is_compiling() and value.numel():
        bad = (value < lower) | (value >= upper)
        if allow is not None:
            bad &= value != allow
        if bad.any():
            extra = f" or {allow}" if allow is not None else ""
            raise ValueError(f"{name}: expected entries in [{lower}, {upper}){extra}, found {value[bad][0].item()}")
    return value


def check_same_device(**tensors: Tensor | None) -> None:
    devices = {name: value.device for name, value in tensors.items() if value is not None}
    if len(set(devices.values())) > 1:
        found = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"{next(iter(devices))}: expected all tensors on one device, found {found}")
