"""`dpo train`: the loop over steps, and what surrounds it (data, reference, evaluation, checkpoints, records)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from dpo.adapters import adapter_of, as_reference
from dpo.checkpoint import find_run, load_state, save_checkpoint, save_model, start_run
from dpo.config import TrainConfig
from dpo.console import Bar, say, table
from dpo.cpu import keep_freed_memory
from dpo.curves import draw_curves
from dpo.engine import evaluate, forward_backward
from dpo.errors import UserError
from dpo.evalpairs import EvalPairs
from dpo.facts import write_facts
from dpo.hub import check_push, push, write_card
from dpo.inputs import (
    Policy,
    check_first_bin,
    load_network,
    load_policy,
    load_train_and_eval,
    objective_of,
    plan_of,
    warn_about_schedule,
)
from dpo.loss import Objective, RefLogps
from dpo.optim import apply_update, build_optimizer, set_lr, warmup_then_constant
from dpo.reference import AdapterOffReference, CachedReference, OnlineReference, freeze, no_reference, store_frozen
from dpo.runlog import NotFinite, RunLog
from dpo.sampler import ReferenceModel, Sampler
from dpo.samples import plan_samples
from dpo.steps import StepBatch, StepDataset, eval_steps
from dpo.trackers import chosen_trackers
from dpo.watch import Watch


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
    """
    keep_freed_memory()
    checkpoint = find_run(config)
    torch.manual_seed(config.seed)
    chosen_trackers(config)
    check_push(config)
    policy = load_policy(config, str(checkpoint / "model") if checkpoint else None, dropout=config.dropout)
    model, device = policy.model, policy.device
    data, eval_data = load_train_and_eval(config, policy)
    objective, plan = objective_of(config), plan_of(config, model)
    steps = StepDataset(data, plan, epochs=config.epochs, max_steps=config.max_steps)
    evals = eval_steps(eval_data, plan) if eval_data is not None else []
    samples = None
    if config.sample_prompts and eval_data is not None:
        samples = plan_samples(config, policy.tokenizer, model, eval_data)
    if checkpoint is None:
        warn_about_schedule(config, len(steps))
        check_first_bin(config, model, data, steps.steps[0][1])
    if config.trains_adapter:
        store_frozen(model, objective)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    optimizer = build_optimizer(
        config.optimizer,
        [p for p in model.parameters() if p.requires_grad],
        lr=config.lr,
        weight_decay=config.weight_decay,
    )
    parts: dict[str, Any] = {"optimizer": optimizer}
    if objective.baseline is not None:
        parts["baseline"] = objective.baseline
    start = load_state(checkpoint, parts) if checkpoint else 0
    ref_logps, eval_ref_logps = _references(config, policy, objective, steps, evals, start)

    run = start_run(config)
    write_facts(run, policy, data, eval_data)
    watch = Watch(run, config, start=start)
    if eval_data is not None:
        watch.pairs = EvalPairs(eval_data, eval_ref_logps, config.beta)
    if samples is not None:
        lend = _reference_lender(config, policy, objective, eval_ref_logps)
        watch.sampler = Sampler(run, samples, policy, lend, objective, start=start)
    log = RunLog(run, start=start, max_skipped=config.max_skipped, watch=watch)
    started = time.perf_counter()
    with Bar("train", len(steps), done=start, log_every=config.log_every) as bar:
        if start == 0:
            _evaluate(log, bar, policy, evals, eval_ref_logps, objective, 0)
        model.train()
        for step in _loader(config, steps, start, device):
            done = step.index + 1
            lr = warmup_then_constant(step.index, config.lr, config.warmup_steps)
            set_lr(optimizer, lr)
            result = forward_backward(model, step.to(device), ref_logps, objective)
            update = apply_update(optimizer, result.sums.loss, config.grad_clip)
            try:
                log.push(bar, step, result, update, lr)
            except NotFinite:
                save_checkpoint(run, done, model, policy.tokenizer, parts, config.keep_checkpoints)
                raise
            if done == len(steps) or _due(config.eval_every, done):
                _evaluate(log, bar, policy, evals, eval_ref_logps, objective, done)
            if done < len(steps) and _due(config.save_every, done):
                log.flush(bar)
                save_checkpoint(run, done, model, policy.tokenizer, parts, config.keep_checkpoints)
            log.restart_clock()
        log.flush(bar)
    log.close()
    _finish(log, bar, policy, config, time.perf_counter() - started)
    return TrainResult(run, policy, log.evals)


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
    order = range(start, len(steps))
    return iter(
        DataLoader(steps, batch_size=None, sampler=order, num_workers=workers, pin_memory=device.type == "cuda")
    )


def _references(
    config: TrainConfig,
    policy: Policy,
    objective: Objective,
    steps: StepDataset,
    evals: Sequence[StepBatch],
    start: int,
) -> tuple[RefLogps, RefLogps]:
    """The reference for training and for evaluation: the policy while it is untrained, else a model of its own."""
    if config.reference == "none":
        return no_reference, no_reference
    # a policy with an adapter carries its reference within: the adapter's absence, or its frozen copy
    carried = start == 0 or adapter_of(policy.model) is not None
    model = policy.model
    if config.reference == "online" or config.reference_model is not None or not carried:
        adapter = config.adapter if config.reference_model is None else None
        path = config.reference_model or config.model
        model = load_network(config, path, flag="--reference-model", adapter=adapter)
        if model.get_output_embeddings().weight.shape[0] != policy.model.get_output_embeddings().weight.shape[0]:
            raise UserError("--reference-model: expected the policy's vocabulary, found one of another size")
        freeze(model, objective)
    model.eval()
    if config.reference != "cached":
        online = (OnlineReference if config.reference == "online" else AdapterOffReference)(model, objective)
        return online, online
    cached, eval_cached = CachedReference(), CachedReference()
    needed = steps.first_uses(start)
    with Bar("reference", len(needed) + len(evals), log_every=config.log_every) as bar:

        def advance(step: StepBatch) -> None:
            bar.advance(pairs=step.num_pairs, tokens=step.num_tokens)

        with as_reference(model):
            cached.fill(model, (steps[i] for i in needed), objective, policy.device, advance)
            eval_cached.fill(model, evals, objective, policy.device, advance)
    return cached, eval_cached


def _reference_lender(config: TrainConfig, policy: Policy, objective: Objective, ref_logps: RefLogps) -> ReferenceModel:
    """Lends the reference as a model: the one in memory, or else loaded for as long as it is lent."""

    @contextmanager
    def lend(done: int) -> Iterator[Any]:
        if isinstance(ref_logps, OnlineReference):
            yield ref_logps.model
        elif done == 0 and config.reference_model is None:
            yield policy.model
        else:
            model = load_network(config, config.reference_model or config.model, flag="--reference-model")
            yield freeze(model, objective)

    return lend


def _evaluate(
    log: RunLog,
    bar: Bar,
    policy: Policy,
    evals: Sequence[StepBatch],
    ref_logps: RefLogps,
    objective: Objective,
    done: int,
) -> None:
    if evals:
        log.flush(bar)
        means = evaluate(policy.model, evals, ref_logps, objective, policy.device, log.watch.see)
        log.evaluated(done, means | log.watch.sample(done))


def _finish(log: RunLog, bar: Bar, policy: Policy, config: TrainConfig, seconds: float) -> None:
    run = Path(config.output)
    save_model(run / "model", policy.model, policy.tokenizer)
    draw_curves(run)
    write_card(run)
    if log.evals:
        names = ("loss", "accuracy", "margin", "chosen_reward", "rejected_reward")
        names += ("chosen_logps_per_token", "rejected_logps_per_token")
        first, last = log.evals[0], log.evals[-1]
        rows = [(name.replace("_", " "), float(first[name]), float(last[name])) for name in names]
        table(
            f"held out, {last['pairs']} pairs",
            ("", f"after {first['step']} steps", f"after {last['step']} steps"),
            rows,
        )
    say(f"{bar.total} steps in {seconds:.0f} s; run folder {run}: model/, metrics.jsonl, eval.jsonl, curves.png")
    push(config, run)
