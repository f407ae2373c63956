"""Log-probs of the frozen reference, per token: cached before training, or computed at every step by a second model or
by the policy without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dpo.adapters import as_reference, factors
from dpo.distributed import gathered, ranks
from dpo.loss import Objective, token_logps
from dpo.parallel import is_sharded
from dpo.steps import Bin, Preferences, StepBatch
from dpo.store import token_keys


def freeze(model: Any, objective: Objective, *, cast: bool = True) -> Any:
    """Makes a model of its own the reference: no gradients, no dropout, frozen weights stored in autocast's dtype.

    cast=False leaves all weights as they are: for a reference that moves, whose small steps would be rounded away.
    """
    model.requires_grad_(False)
    model.eval()
    return store_frozen(model, objective) if cast else model


def store_frozen(model: Any, objective: Objective) -> Any:
    """Stores linear weights that do not train in autocast's dtype.

    Autocast would cast them at every step to the same bits: this saves the time and half of their memory. The LM head
    stays (it may be tied to the embedding, and casts tile by tile), and so do adapters and what ranks hold parts of.
    """
    if objective.autocast is None or is_sharded(model):
        return model
    for module in linear_layers(model):
        if module.weight.is_floating_point() and not module.weight.requires_grad:
            module.to(objective.autocast)
    return model


def linear_layers(model: Any) -> Iterator[nn.Linear]:
    """The linear layers of a model, but for its LM head and adapters."""
    kept = {*model.get_output_embeddings().modules(), *factors(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in kept:
            yield module


class OnlineReference:
    """Runs the reference on each bin as it comes: memory for a second model, no pass beforehand."""

    def __init__(self, model: Any, objective: Objective) -> None:
        self.model, self.objective = model, objective

    def __call__(self, b: Bin) -> Tensor:
        """Per-token log-probs [N] of the bin, fp32."""
        with torch.no_grad():
            return token_logps(self.model, b.batch, self.objective)


class AdapterOffReference(OnlineReference):
    """Runs the policy itself with its adapter off (or with a frozen copy of the one it started from): one model."""

    def __call__(self, b: Bin) -> Tensor:
        """Per-token log-probs [N] of the bin, fp32."""
        with as_reference(self.model):
            return super().__call__(b)


def no_reference(b: Bin) -> None:
    """For losses of the policy's log-probs alone."""


class MovingReference(OnlineReference):
    """A reference that follows the policy: every `every` updates, reference = mix * policy + (1 - mix) * reference.

    TR-DPO (Gorbatovski et al. 2024, equations 3 and 4): mix < 1 is its soft update, mix = 1 its hard one.
    """

    def __init__(self, model: Any, objective: Objective, policy: Any, *, every: int, mix: float) -> None:
        super().__init__(model, objective)
        self.policy, self.every, self.mix = policy, every, mix

    @torch.no_grad()
    def after_update(self, done: int) -> None:
        """Moves the reference where that is due after `done` updates."""
        if done % self.every:
            return
        policy = dict(self.policy.named_parameters())
        for name, held in self.model.named_parameters():
            held.lerp_(policy[name].to(held.dtype), self.mix)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.model.named_parameters())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, held in self.model.named_parameters():
                held.copy_(state[name])


class Holder(Protocol):
    """Where log-probs are kept: by key, in memory or on disk. `dpo.store.ReferenceStore` is one."""

    def __contains__(self, key: Any, /) -> bool: ...
    def __getitem__(self, key: Any, /) -> Tensor: ...
    def put(self, key: Any, logps: Tensor, /) -> None: ...
    def commit(self) -> None: ...
    def flush(self) -> None: ...
    def exchange(self) -> None: ...


class InMemory(dict[Any, Tensor]):
    """Log-probs that go with the process."""

    def put(self, key: Any, logps: Tensor) -> None:
        self.setdefault(key, logps)

    def commit(self) -> None: ...
    def flush(self) -> None: ...

    def exchange(self) -> None:
        """Takes over what the other ranks hold; what a rank has computed itself stays."""
        flat = torch.cat(list(self.values())) if self else torch.empty(0)
        for keys, lengths, logps in gathered((list(self), [len(part) for part in self.values()], flat)):
            for key, part in zip(keys, logps.split(lengths) if keys else (), strict=True):
                self.put(key, part)


class CachedReference:
    """Per-token log-probs of every completion, kept on the host in fp32 and looked up by group and completion.

    Filled bin by bin with the code and the shapes that training uses: where the policy still equals the reference, the
    first epoch's margins are exactly zero.
    """

    def __init__(self, held: Holder | None = None, data: Preferences | None = None) -> None:
        """In memory; or, given both, in `held` under keys of the tokens of `data`."""
        self._held = InMemory() if held is None else held
        self._data = data
        self._keys: dict[int, list[bytes]] = {}

    def _key(self, group: int, completion: int) -> Any:
        if self._data is None:
            return group, completion
        if group not in self._keys:
            self._keys[group] = token_keys(self._data[group])
        return self._keys[group][completion]

    def _of(self, b: Bin) -> list[Any]:
        return [self._key(group, c) for group, completions in b.members for c in completions]

    def holds(self, groups: Sequence[int]) -> bool:
        """Whether every completion of these groups of the data is there."""
        assert self._data is not None
        keys = (self._key(g, c) for g in groups for c in range(len(self._data[g].completions)))
        return all(key in self._held for key in keys)

    def fill(
        self,
        model: Any,
        steps: Iterable[StepBatch],
        objective: Objective,
        device: torch.device,
        advance: Callable[[StepBatch], None] = lambda step: None,
    ) -> None:
        """Computes what the steps need and is not there yet; of several ranks each its bins, and all hold everything.

        Args:
            advance: called after each step, for progress.
        """
        online = OnlineReference(model, objective)
        try:
            for step in steps:
                for b in step.all_bins:
                    keys = self._of(b)
                    # ranks that share a model run every bin together
                    if ranks() == 1 and all(key in self._held for key in keys):
                        continue
                    logps = online(b.to(device)).cpu()
                    if keys:  # an empty bin has none
                        for key, part in zip(keys, logps.split(b.batch.completion_lengths.tolist()), strict=True):
                            self._held.put(key, part)
                self._held.commit()
                advance(step)
        finally:
            self._held.flush()
        if ranks() > 1:
            self._held.exchange()

    def total(self, group: int, completion: int, *, minus: CachedReference | None = None) -> float:
        """Sum over one completion's tokens, in float64; of the difference to another model's log-probs where given."""
        logps = self._held[self._key(group, completion)].double()
        if minus is not None:
            logps = logps - minus._held[minus._key(group, completion)].double()
        return logps.sum().item()

    def __call__(self, b: Bin) -> Tensor:
        """Per-token log-probs [N] of the bin, on the bin's device."""
        if not b.members:
            return torch.zeros(len(b.batch.targets), device=b.batch.input_ids.device)
        held = [self._held[key] for key in self._of(b)]
        return torch.cat(held).to(b.batch.input_ids.device, non_blocking=True)
