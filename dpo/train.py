"""`dpo train`: the loop over steps, and what surrounds it (data, reference, evaluation, checkpoints, records)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpo.best import BestEvaluation
from dpo.checkpoint import (
    Stateful,
    find_run,
    finish_run,
    finished_steps,
    load_checkpoint,
    model_folder,
    open_run,
    save_checkpoint,
    save_model,
    writing,
)
from dpo.config import TrainConfig
from dpo.console import Bar, say, table
from dpo.cpu import keep_freed_memory
from dpo.curves import draw_curves
from dpo.distributed import check_same, gathered, is_main, on_main, rank
from dpo.engine import evaluate, forward_backward
from dpo.errors import UserError
from dpo.evalpairs import EvalPairs
from dpo.facts import write_facts
from dpo.hub import check_push, push, write_card
from dpo.inputs import (
    Policy,
    check_budget,
    check_first_bin,
    load_network,
    load_policy,
    load_train_and_eval,
    objective_of,
    plan_of,
    warn_about_schedule,
)
from dpo.interrupt import Interrupted, StopSignal
from dpo.loss import Objective
from dpo.metrics import read_json_lines
from dpo.placement import place_policy
from dpo.reference import store_frozen
from dpo.refsetup import References, ReferenceSource, set_up_references
from dpo.rng import random_state, restore_random_state, seed_all
from dpo.runlog import NotFinite, RunLog
from dpo.sampler import Sampler
from dpo.samples import plan_samples
from dpo.sharded import mesh_of, take_weights
from dpo.steps import StepBatch, StepDataset, eval_steps
from dpo.trackers import chosen_trackers
from dpo.updater import Updater
from dpo.watch import Watch
from dpo.workers import end_with_parent


@dataclass(frozen=True)
class TrainResult:
    """What a finished run leaves in memory; the run folder holds the same."""

    run: Path
    policy: Policy
    evals: list[dict[str, Any]]


def train(config: TrainConfig) -> TrainResult:
    """Trains as configured and writes the run folder.

    Raises:
        UserError: something in the configuration, the data or the model cannot work; nothing was written over.
        Stopped: a signal asked for it; there is a checkpoint to go on from.
    """
    keep_freed_memory()
    checkpoint = on_main(lambda: find_run(config))
    seed_all(config.seed)
    chosen_trackers(config)
    check_push(config)
    policy = load_policy(config, model_folder(checkpoint), dropout=config.dropout)
    data, eval_data = load_train_and_eval(config, policy)
    check_same("--data", data.digest())
    objective = objective_of(config)
    policy, plan = place_policy(config, policy, objective, plan_of(config, policy.model))
    model, device = policy.model, policy.device
    steps = StepDataset(data, plan, epochs=config.epochs, max_steps=config.max_steps)
    evals = eval_steps(eval_data, plan) if eval_data is not None else []
    samples = None
    if config.sample_prompts and eval_data is not None:
        samples = plan_samples(config, policy.tokenizer, model, eval_data)
    if config.resume != "never" and on_main(lambda: finished_steps(Path(config.output))) == len(steps):
        return _as_finished(config)
    check_budget(data, plan)
    if checkpoint is None:
        warn_about_schedule(config, len(steps))
        check_first_bin(config, model, data, steps.steps[0][1])
    if config.trains_adapter:
        store_frozen(model, objective)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    updater = Updater(config, model, len(steps))
    state = load_checkpoint(checkpoint, mesh_of(model)) if checkpoint else None
    start = state["step"] if state else 0
    source = ReferenceSource(config, policy, objective, untrained=start == 0)
    known, make_ready = set_up_references(source, data, eval_data, evals)

    with open_run(config, checkpoint) as run, StopSignal() as stop:
        if is_main():
            write_facts(run, policy, data, eval_data)
        references = make_ready(steps, stop)
        watch = Watch(run, config, start=start)
        if eval_data is not None:
            watch.pairs = EvalPairs(eval_data)
        if samples is not None:
            watch.sampler = Sampler(run, samples, policy, source.lend, objective, start=start)
        log = RunLog(run, start=start, max_skipped=config.max_skipped, watch=watch)
        best = BestEvaluation(config.best_metric, config.early_stop)
        parts: dict[str, Stateful] = {**updater.parts, "log": log, "best": best}
        if objective.baseline is not None:
            parts["baseline"] = objective.baseline
        if references.moving is not None:
            parts["reference"] = references.moving
        identity: dict[str, Any] = {"data": data.digest(), "reference": known}
        if config.schedule in ("linear", "cosine"):
            identity["number of steps"] = len(steps)
        session = Session(config, policy, objective, updater, parts, log, best, stop, references, identity, start)
        if state is not None:
            session.restore(checkpoint, state)
        started = time.perf_counter()
        with closing(log), Bar("train", len(steps), done=start, log_every=config.log_every) as bar:
            session.between_steps(bar, start, len(steps), evals)
            model.train()
            for step in _loader(config, steps, start, device):
                if best.stop:
                    break
                session.step(bar, step.to(device))
                session.between_steps(bar, step.index + 1, len(steps), evals)
        _finish(session, bar, time.perf_counter() - started)
        finish_run(run, len(steps))
    return TrainResult(run, policy, log.evals)


@dataclass
class Session:
    """A run under way: a step, and what happens between two of them."""

    config: TrainConfig
    policy: Policy
    objective: Objective
    updater: Updater
    parts: dict[str, Stateful]
    """Everything whose state goes into a checkpoint, by name."""
    log: RunLog
    best: BestEvaluation
    stop: StopSignal
    references: References
    identity: dict[str, Any]
    """What a checkpoint and its continuation must have in common, besides the settings."""
    saved: int
    """The step of the newest checkpoint."""

    def step(self, bar: Bar, step: StepBatch) -> None:
        """One update."""
        scale = self.updater.loss_scale
        result = forward_backward(self.policy.model, step, self.references.train, self.objective, scale)
        update, lr = self.updater(step.index, result.sums.loss)
        if self.references.moving is not None:
            self.references.moving.after_update(step.index + 1)
        with self._saving(step.index + 1):
            self.log.push(bar, step, result, update, lr)

    def between_steps(self, bar: Bar, done: int, total: int, evals: Sequence[StepBatch]) -> None:
        """After `done` updates: evaluates and saves where that is due, and ends the run where a signal asks for it."""
        better = False
        if evals and not self.log.has_evaluated(done) and (done in (0, total) or _due(self.config.eval_every, done)):
            with suppress(Interrupted):  # the run that goes on from here evaluates
                better = self._evaluate(bar, done, evals)
        stopped = self.stop.asked()
        due = done < total and (better or _due(self.config.save_every, done))
        if done > self.saved and (stopped or due or done == total):
            with self._saving(done):
                self.log.flush(bar)
            if stopped or due:
                self.save(done)
        self.stop.check(f"checkpoint of step {self.saved} saved" if self.saved else "no step was done yet")
        self.log.restart_clock()

    def _evaluate(self, bar: Bar, done: int, evals: Sequence[StepBatch]) -> bool:
        with self._saving(done):
            self.log.flush(bar)
        steps = self.stop.watch(evals)
        with self.updater.averaged():
            model, device, see = self.policy.model, self.policy.device, self.log.watch.see
            means = evaluate(model, steps, self.references.eval, self.objective, device, see)
            means |= self.log.watch.sample(done)
        self.log.evaluated(done, means)
        return self.best.take(done, means)

    @contextmanager
    def _saving(self, done: int) -> Iterator[None]:
        """Saves the last good weights before the run stops for updates that were not finite."""
        try:
            yield
        except NotFinite:
            self.save(done)
            raise

    def save(self, done: int) -> None:
        """Writes the checkpoint after `done` updates."""
        self.log.sync()
        state = {
            "identity": self.identity,
            "random": gathered(random_state()),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }
        save_checkpoint(
            Path(self.config.output),
            done,
            self.policy.model,
            self.policy.tokenizer,
            state,
            keep=self.config.keep_checkpoints,
            best=self.best.step,
        )
        self.saved = done

    def take_weights(self, checkpoint: Path) -> None:
        """Takes over a checkpoint's weights, and nothing else of it."""
        state = load_checkpoint(checkpoint, mesh_of(self.policy.model))
        if "weights" in state:
            take_weights(self.policy.model, state["weights"])
        else:
            weights = dict(load_network(self.config, str(checkpoint / "model")).named_parameters())
            trained = {name for name, p in self.policy.model.named_parameters() if p.requires_grad}
            take_weights(self.policy.model, {name: weights[name] for name in trained}, only=trained)
        if self.updater.average is not None:
            self.updater.average.load_state_dict(state["parts"]["average"])

    def restore(self, checkpoint: Path | None, state: dict[str, Any]) -> None:
        """Takes over a checkpoint's state, generators last: nothing may draw between here and the next step."""
        for name, value in self.identity.items():
            if state["identity"].get(name) != value:
                raise UserError(f"--resume: expected the same {name} as at {checkpoint}, found another")
        for name, part in self.parts.items():
            if name not in state["parts"]:
                raise UserError(f"--resume: expected {checkpoint} to hold the state of {name}, found none")
            part.load_state_dict(state["parts"][name])
        if "weights" in state:
            take_weights(self.policy.model, state["weights"])
        if rank() < len(state["random"]):
            restore_random_state(state["random"][rank()])
        else:  # more ranks than before
            seed_all(self.config.seed, rank(), state["step"])


def enable_checkpointing(model: Any) -> None:
    """Recomputes activations in the backward (the method was renamed within the Transformers releases supported)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _loader(config: TrainConfig, steps: StepDataset, start: int, device: torch.device) -> Iterator[StepBatch]:
    workers = config.data_workers
    if workers is None:
        workers = 2 if device.type == "cuda" else 0
    # a generator of its own: an iterator of torch's draws from the run's otherwise
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, len(steps)),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),
        worker_init_fn=end_with_parent,
    )
    return iter(loader)


def _as_finished(config: TrainConfig) -> TrainResult:
    """What a run that ended before left."""
    run = Path(config.output)
    say(f"{run}: the run is finished already")
    return TrainResult(run, load_policy(config, str(run / "model")), read_json_lines(run / "eval.jsonl"))


def _finish(session: Session, bar: Bar, seconds: float) -> None:
    policy, config, log, best = session.policy, session.config, session.log, session.best
    run = Path(config.output)
    if best.step is not None:
        if log.evals and best.step != log.evals[-1]["step"]:
            session.take_weights(run / "checkpoints" / f"step-{best.step}")
        say(f"best held-out {best.metric} {best.value:.4f} after {best.step} steps: model/ is that one")
    if session.updater.average is not None:
        session.updater.average.apply()
    with writing(run):
        save_model(run / "model", policy.model, policy.tokenizer)
        if is_main():
            draw_curves(run)
            write_card(run)
    _summary(log)
    say(f"{bar.done} steps in {seconds:.0f} s; run folder {run}: model/, metrics.jsonl, eval.jsonl, curves.png")
    if is_main():
        push(config, run)


def _summary(log: RunLog) -> None:
    """Prints the first and the last evaluation."""
    if not log.evals:
        return
    names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
    names += ("chosen_logps_per_token", "rejected_logps_per_token")
    first, last = log.evals[0], log.evals[-1]
    rows = [(name.replace("_", " "), float(first[name]), float(last[name])) for name in names]
    table(
        f"held out, {last['pairs']} pairs",
        ("", f"after {first['step']} steps", f"after {last['step']} steps"),
        rows,
    )
