"""From settings to the reference: which model it is, what it is known by, and where its log-probs come from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import transformers

from dpo import __version__
from dpo.adapters import adapter_of, as_reference
from dpo.config import DataConfig, TrainConfig
from dpo.console import Bar
from dpo.distributed import gathered
from dpo.errors import UserError
from dpo.fingerprint import FileDigests, digest_of, model_digest
from dpo.inputs import Policy, load_network
from dpo.interrupt import StopSignal
from dpo.loss import Objective, RefLogps
from dpo.placement import place_model
from dpo.reference import (
    AdapterOffReference,
    CachedReference,
    MovingReference,
    OnlineReference,
    freeze,
    no_reference,
)
from dpo.steps import Preferences, StepBatch, StepDataset
from dpo.store import ReferenceStore, default_root

Item = TypeVar("Item")


class ReferenceSource:
    """The reference of a run: the policy while it is untrained, else a model of its own, loaded when it is needed."""

    def __init__(self, config: DataConfig, policy: Policy, objective: Objective, *, untrained: bool) -> None:
        self.config, self.policy, self.objective = config, policy, objective
        # a policy with an adapter carries its reference within: the adapter's absence, or its frozen copy
        carried = untrained or adapter_of(policy.model) is not None
        self._model = policy.model if carried and config.reference_model is None else None
        self._identity: dict[str, Any] | None = None

    @property
    def root(self) -> Path:
        return Path(self.config.reference_cache) if self.config.reference_cache else default_root()

    def model(self) -> Any:
        """The model; use it inside `computing`. Raises UserError for another vocabulary than the policy's."""
        if self._model is None:
            self._model = self.own_model()
        return self._model

    def keep(self, model: Any) -> None:
        """Takes a model that is in memory as the reference; None: from now on it is another."""
        self._model = model

    @contextmanager
    def lend(self, done: int) -> Iterator[Any]:
        """Lends the model after `done` updates: one that is in memory, or else loaded for as long as it is lent."""
        in_memory = self._model is not None and (self._model is not self.policy.model or self._carries(done))
        model = self._model if in_memory else self.own_model()
        with self.computing(model):
            yield model

    @contextmanager
    def computing(self, model: Any) -> Iterator[None]:
        """Inside, the model computes what the reference does: an adapter that trains is off, the reference's is on."""
        if model is self.policy.model and isinstance(self.config, TrainConfig):
            with as_reference(model):
                yield
        else:
            model.eval()
            yield

    def _carries(self, done: int) -> bool:
        return done == 0 or adapter_of(self.policy.model) is not None

    def own_model(self, *, cast: bool = True) -> Any:
        """A model that is not the policy, frozen; `cast` as of `freeze`."""
        path = self.config.reference_model or self.config.model
        adapter = self.config.adapter if self.config.reference_model is None else None
        model = load_network(self.config, path, flag="--reference-model", adapter=adapter)
        if _vocabulary(model) != _vocabulary(self.policy.model):
            raise UserError("--reference-model: expected the policy's vocabulary, found one of another size")
        # what FSDP gathers is in autocast's dtype in any case
        freeze(model, self.objective, cast=cast and self.policy.parallel != "fsdp")
        place_model(model, self.policy.parallel, self.policy, self.objective)
        return model

    def identity(self) -> dict[str, Any]:
        """Everything that the reference's log-probs depend on, the tokens aside."""
        if self._identity is None:
            self._identity = {
                "format": 1,
                "model": self._digest(),
                "vocabulary": _vocabulary(self.policy.model),
                "parameters": self.config.param_dtype,
                "arithmetic": self.config.dtype,
                "fused-dpo": __version__,
                "transformers": transformers.__version__,
            }
            if getattr(self.config, "load_in_4bit", False):
                self._identity["quantisation"] = "nf4"
        return self._identity

    def _digest(self) -> str | list[str]:
        digests = FileDigests(self.root / "digests.json")
        path = self.config.reference_model or self.config.model
        flag = "--reference-model" if self.config.reference_model else "--model"
        try:
            found = model_digest(path, digests, flag=flag)
            if self.config.adapter is None or self.config.reference_model is not None:
                return found
            return [found, model_digest(self.config.adapter, digests, flag="--adapter", with_base=False)]
        except UserError:
            if self._model is not None:
                raise
            self.model()  # brings the files of a model id into the local cache, and has better words for what is wrong
            return self._digest()

    def open_store(self) -> ReferenceStore:
        """The store of this reference. Raises UserError where it cannot be."""
        return ReferenceStore(self.root, self.identity())


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _shapes(model: Any) -> dict[str, Any]:
    return {name: p.shape for name, p in model.named_parameters()}


@dataclass(frozen=True)
class References:
    """The reference as training and evaluation use it."""

    train: RefLogps
    eval: RefLogps
    moving: MovingReference | None


def set_up_references(
    source: ReferenceSource, data: Preferences, eval_data: Preferences | None, evals: Sequence[StepBatch]
) -> tuple[str, Callable[[StepDataset, StopSignal], References]]:
    """What the reference of a run is known by, and a function that makes it ready, which may take long.

    What can be refused is refused here. Evaluation never sees a reference that has moved: its log-probs are then those
    from before training.
    """
    config = source.config
    assert isinstance(config, TrainConfig)
    if config.reference == "none":
        return "none", lambda steps, stop: References(no_reference, no_reference, None)
    known = digest_of(source.identity())
    store = source.open_store() if config.reference == "cached" or config.ref_update_every else None
    if config.reference == "cached":
        assert store is not None

        def cached(steps: StepDataset, stop: StopSignal) -> References:
            train, held_out = fill_store(source, store, data, steps, eval_data, evals, stop)
            return References(train, held_out, None)

        return known, cached
    if config.reference == "adapter-off":
        carried = AdapterOffReference(source.policy.model, source.objective)
        return known, lambda steps, stop: References(carried, carried, None)
    model = source.own_model(cast=config.ref_update_every is None)
    if config.ref_update_every and _shapes(model) != _shapes(source.policy.model):
        raise UserError("--ref-update-every: expected a reference with the policy's parameters, found another model")

    source.keep(model)

    def online(steps: StepDataset, stop: StopSignal) -> References:
        if store is None or config.ref_update_every is None:
            reference = OnlineReference(model, source.objective)
            return References(reference, reference, None)
        mix = 0.6 if config.ref_mix is None else config.ref_mix
        every, policy = config.ref_update_every, source.policy.model
        held_out = fill_store(source, store, None, None, eval_data, evals, stop)[1]
        source.keep(None)  # it moves
        moving = MovingReference(model, source.objective, policy, every=every, mix=mix)
        return References(moving, held_out, moving)

    return known, online


def _lacking_anywhere(items: Sequence[Item], holds: Callable[[Item], bool]) -> list[Item]:
    """The items that some rank lacks something of: all ranks compute them together."""
    found = gathered([not holds(item) for item in items])
    return [item for item, lacks in zip(items, zip(*found, strict=True), strict=True) if any(lacks)]


def fill_store(
    source: ReferenceSource,
    store: ReferenceStore,
    data: Preferences | None,
    steps: StepDataset | None,
    eval_data: Preferences | None,
    evals: Sequence[StepBatch],
    stop: StopSignal,
) -> tuple[CachedReference, CachedReference]:
    """Computes what the store lacks of the steps' first uses and of the held-out data; only then is a model loaded."""
    train, held_out = CachedReference(store, data), CachedReference(store, eval_data)
    uses = [] if steps is None else _lacking_anywhere(steps.first_uses(), lambda i: train.holds(steps.steps[i][1]))
    lacking = _lacking_anywhere(evals, lambda step: held_out.holds([i for b in step.all_bins for i, _ in b.members]))
    if not uses and not lacking:
        return train, held_out
    config, device = source.config, source.policy.device
    log_every = config.log_every if isinstance(config, TrainConfig) else 10
    with Bar("reference", len(uses) + len(lacking), log_every=log_every) as bar:

        def advance(step: StepBatch) -> None:
            bar.advance(pairs=step.num_pairs, tokens=step.num_tokens)
            stop.check(f"the reference's log-probs so far are in {store.folder}")

        model = source.model()
        with source.computing(model):
            if steps is not None:
                train.fill(model, (steps[i] for i in uses), source.objective, device, advance)
            held_out.fill(model, lacking, source.objective, device, advance)
        if model is not source.policy.model:
            source.keep(None)  # its memory is worth more than the time to load it again
    return train, held_out
