"""Arithmetic around the update: loss scaling for fp16, fp32 gradients and weights behind bf16 parameters, averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dpo.rounding import first_element, local, mixed, round_at_random


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
        self.targets = [self._target(p) for p in params]
        self._sums: dict[nn.Parameter, Tensor] = {}
        for p in self.params:
            p.register_post_accumulate_grad_hook(self._collect)

    @staticmethod
    def _target(p: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(p.detach().float())

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

    Steps too small for bf16 then count on average (Zamirai et al. 2020, *Revisiting BFloat16 Training*). What is drawn
    depends on the seed, the number of updates, the parameter and the element, and on no generator: it is the same on
    any number of ranks.
    """

    def __init__(self, params: Sequence[nn.Parameter], seed: int, *, chunk: int = 1 << 26) -> None:
        super().__init__(params)
        self.seed, self.updates, self.chunk = seed, 0, chunk

    @staticmethod
    def _target(p: nn.Parameter) -> nn.Parameter:
        target = nn.Parameter(torch.empty_like(p, dtype=torch.float32))
        local(target).untyped_storage().resize_(0)
        return target

    def chunks(self) -> Iterator[None]:
        for members in self._members():
            for k in members:
                p, target = local(self.params[k]), local(self.targets[k])
                target.untyped_storage().resize_(target.nbytes)
                target.copy_(p)
                self.targets[k].grad = self._sums.get(self.params[k])
            yield
            for k in members:
                p, target = local(self.params[k]), local(self.targets[k])
                key = mixed(self.seed, self.updates, k)
                exact = p.dtype == torch.float32  # some models keep parts in fp32
                p.copy_(target if exact else round_at_random(target, key, first_element(self.params[k])))
                self.targets[k].grad = None
                target.untyped_storage().resize_(0)
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
            size += local(p).numel()
        return parts

    def fp32(self) -> list[Tensor]:
        return [p.detach().float() for p in self.params]

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]


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

    @torch.no_grad()
    def apply(self) -> None:
        """The parameters are the average from now on."""
        for p, value in zip(self.params, self.held, strict=True):
            p.copy_(value)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the average inside the block, where what they were takes as much memory as gradients."""
        before = [p.detach().clone() for p in self.params]
        self.apply()  # in place: ranks that share a model hold on to the tensors themselves
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in zip(self.params, before, strict=True):
                    p.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for value, held in zip(self.held, state["average"], strict=True):
            value.copy_(held)
