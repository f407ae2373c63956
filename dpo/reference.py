"""Log-probs of the frozen reference, per token: cached before training, or computed at every step by a second model or
by the policy without its adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpo.adapters import as_reference, factors
from dpo.loss import Objective, token_logps
from dpo.steps import Bin, StepBatch


def freeze(model: Any, objective: Objective) -> Any:
    """Makes a model of its own the reference: no gradients, no dropout, frozen weights stored in autocast's dtype."""
    model.requires_grad_(False)
    model.eval()
    return store_frozen(model, objective)


def store_frozen(model: Any, objective: Objective) -> Any:
    """Stores linear weights that do not train in autocast's dtype.

    Autocast would cast them at every step to the same bits: this saves the time and half of their memory. The LM head
    stays (it may be tied to the embedding, and casts tile by tile), and so do adapters.
    """
    if objective.autocast is None:
        return model
    head = model.get_output_embeddings()
    kept = {*head.modules(), *factors(model)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and module not in kept and not module.weight.requires_grad:
            module.to(objective.autocast)
    return model


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


class CachedReference:
    """Per-token log-probs of every completion, kept on the host in fp32 and looked up by group and completion.

    Filled bin by bin with the code and the shapes that training uses: where the policy still equals the reference, the
    first epoch's margins are exactly zero.
    """

    def __init__(self) -> None:
        self._logps: dict[tuple[int, int], Tensor] = {}

    def fill(
        self,
        model: Any,
        steps: Iterable[StepBatch],
        objective: Objective,
        device: torch.device,
        advance: Callable[[StepBatch], None] = lambda step: None,
    ) -> None:
        """Computes what the steps need and is not there yet.

        Args:
            advance: called after each step, for progress.
        """
        online = OnlineReference(model, objective)
        for step in steps:
            for b in step.all_bins:
                keys = [(group, c) for group, completions in b.members for c in completions]
                if all(key in self._logps for key in keys):
                    continue
                logps = online(b.to(device)).cpu()
                self._logps.update(zip(keys, logps.split(b.batch.completion_lengths.tolist()), strict=True))
            advance(step)

    def total(self, group: int, completion: int, *, minus: CachedReference | None = None) -> float:
        """Sum over one completion's tokens, in float64; of the difference to another model's log-probs where given."""
        logps = self._logps[group, completion].double()
        if minus is not None:
            logps = logps - minus._logps[group, completion].double()
        return logps.sum().item()

    def __call__(self, b: Bin) -> Tensor:
        """Per-token log-probs [N] of the bin, on the bin's device."""
        held = [self._logps[group, c] for group, completions in b.members for c in completions]
        return torch.cat(held).to(b.batch.input_ids.device, non_blocking=True)
