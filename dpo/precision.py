"""Arithmetic around the update: loss scaling for fp16, fp32 gradients and weights behind bf16 parameters, averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class LossScale:
    """Dynamic loss scaling: halved after an overflow, doubled after `interval` steps without one.

    Micikevicius et al. 2018, *Mixed Precision Training*, with the numbers of torch.amp.GradScaler. Lives on the device:
    nothing here waits for it.
    """

    def __init__(self, device: torch.device, *, start: float = 2.0**16, interval: int = 2000) -> None:
        self.scale = torch.full((), start, device=device)
        self.interval = interval
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @torch.no_grad()
    def update(self, overflow: Tensor) -> None:
        """Takes the next step's scale from whether this one overflowed (fp32 scalar, 1.0 or 0.0)."""
        update = torch._amp_update_scale_  # pyright: ignore[reportPrivateImportUsage]
        update(self.scale, self._good_steps, overflow, 2.0, 0.5, self.interval)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale.clone(), "good_steps": self._good_steps.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(state["scale"])
        self._good_steps.copy_(state["good_steps"])


class Weights:
    """What the optimizer updates: the parameters themselves."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = list(params)
        self.targets: list[nn.Parameter] = self.params
        """The tensors that the optimizer holds."""

    def grads(self) -> list[Tensor]:
        """The gradients of the step so far, of those parameters that have one."""
        return [p.grad for p in self.params if p.grad is not None]

    def chunks(self) -> Iterator[None]:
        """For each part of the parameters: gets ready for `optimizer.step()`, and takes over its result after it."""
        yield
        self.clear()

    def release(self) -> None:
        """Call when the optimizer is built: lets go what only that needed."""

    def clear(self) -> None:
        """Lets the gradients go."""
        for p in self.params:
            p.grad = None

    def fp32(self) -> list[Tensor]:
        """The weights at the precision that they have."""
        return [p.detach() for p in self.params]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class MasterWeights(Weights):
    """fp32 weights behind bf16 parameters. Gradients add up in fp32, bin by bin; parameters are rounded copies."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        super().__init__(params)
        self.targets = [nn.Parameter(p.detach().float()) for p in params]
        self._sums: dict[nn.Parameter, Tensor] = {}
        for p in self.params:
            p.register_post_accumulate_grad_hook(self._collect)

    def _collect(self, p: Tensor) -> None:
        assert isinstance(p, nn.Parameter)
        assert p.grad is not None
        held = self._sums.get(p)
        if held is None:
            self._sums[p] = p.grad.float()
        else:
            held += p.grad
        p.grad = None

    def grads(self) -> list[Tensor]:
        return [self._sums[p] for p in self.params if p in self._sums]

    def chunks(self) -> Iterator[None]:
        for p, target in zip(self.params, self.targets, strict=True):
            target.grad = self._sums.get(p)
        yield
        with torch.no_grad():
            for p, target in zip(self.params, self.targets, strict=True):
                p.copy_(target)
        self.clear()

    def clear(self) -> None:
        self._sums.clear()
        for target in self.targets:
            target.grad = None

    def fp32(self) -> list[Tensor]:
        return [target.detach() for target in self.targets]

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.fp32()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for target, held in zip(self.targets, state["weights"], strict=True):
            target.data.copy_(held)


class RoundedWeights(MasterWeights):
    """bf16 parameters without a copy in fp32: an update is computed in fp32 and rounded up or down at random.

    The chance of rounding up is the distance to the lower neighbour, so that steps too small for bf16 count on average
    (Zamirai et al. 2020, *Revisiting BFloat16 Training*). Draws depend on the seed and on the number of updates, not on
    any other generator.
    """

    def __init__(self, params: Sequence[nn.Parameter], seed: int, *, chunk: int = 1 << 26) -> None:
        super().__init__(params)
        self.seed, self.updates, self.chunk = seed, 0, chunk

    def release(self) -> None:
        for target in self.targets:
            target.data = target.data.new_empty(0)

    def chunks(self) -> Iterator[None]:
        generators: dict[torch.device, torch.Generator] = {}
        for members in self._members():
            for k in members:
                self.targets[k].data = self.params[k].detach().float()
                self.targets[k].grad = self._sums.get(self.params[k])
            yield
            for k in members:
                p, target = self.params[k], self.targets[k]
                if p.device not in generators:
                    seed = self.seed * 1_000_003 + self.updates
                    generators[p.device] = torch.Generator(p.device).manual_seed(seed)
                p.data.copy_(round_at_random(target.data, generators[p.device]))
                target.grad = None
                target.data = target.data.new_empty(0)
        self.updates += 1
        self.clear()

    def _members(self) -> list[list[int]]:
        """Numbers of parameters in parts of about `chunk` elements: so much is held in fp32 at a time."""
        parts: list[list[int]] = []
        size = self.chunk
        for k, p in enumerate(self.params):
            if size >= self.chunk:
                parts.append([])
                size = 0
            parts[-1].append(k)
            size += p.numel()
        return parts

    def fp32(self) -> list[Tensor]:
        return [p.detach().float() for p in self.params]

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds fp32 values to one of their two bf16 neighbours; those that are bf16, infinite or NaN stay.

    bf16 is the upper half of the bits of fp32: a random number below 2**16 is added to them before the lower half goes.
    """
    noise = torch.randint(0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    bits = (values.contiguous().view(torch.int32) + noise) & ~0xFFFF
    return torch.where(values.isfinite(), bits.view(torch.float32), values).bfloat16()


class Average:
    """Exponential moving average of the weights, in fp32: average = decay * average + (1 - decay) * weights."""

    def __init__(self, params: Sequence[nn.Parameter], weights: Weights, decay: float) -> None:
        self.params, self.weights, self.decay = list(params), weights, decay
        self.held = [value.clone() for value in weights.fp32()]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights after an update in."""
        for average, value in zip(self.held, self.weights.fp32(), strict=True):
            average.lerp_(value, 1.0 - self.decay)

    def apply(self) -> None:
        """The parameters are the average from now on."""
        for p, value in zip(self.params, self.held, strict=True):
            p.data = value.to(p.dtype)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the average inside the block."""
        before = [p.data for p in self.params]
        self.apply()
        try:
            yield
        finally:
            for p, value in zip(self.params, before, strict=True):
                p.data = value

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for value, held in zip(self.held, state["average"], strict=True):
            value.copy_(held)
