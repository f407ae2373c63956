"""`dpo cache`: fills the reference store for training runs to come."""

from __future__ import annotations

from pathlib import Path

from dpo.commands import CacheConfig
from dpo.console import say
from dpo.cpu import keep_freed_memory
from dpo.inputs import check_budget, check_first_bin, load_policy, load_train_and_eval, objective_of, plan_of
from dpo.interrupt import StopSignal
from dpo.placement import place_policy
from dpo.refsetup import ReferenceSource, fill_store
from dpo.rng import seed_all
from dpo.steps import StepDataset, eval_steps


def cache(config: CacheConfig) -> Path:
    """Computes the reference's log-probs of --data and --eval-data where the store does not hold them yet.

    Returns:
        the folder of this reference in the store.
    Raises:
        UserError: a model or the data cannot be used, or the store cannot be written.
        Stopped: a signal asked for it; what was computed is in the store.
    """
    keep_freed_memory()
    seed_all(config.seed)
    policy = load_policy(config)
    data, eval_data = load_train_and_eval(config, policy)
    objective = objective_of(config)
    policy, plan = place_policy(config, policy, objective, plan_of(config, policy.model))
    steps = StepDataset(data, plan)
    evals = eval_steps(eval_data, plan) if eval_data is not None else []
    check_budget(data, plan)
    check_first_bin(config, policy.model, data, steps.steps[0][1])
    source = ReferenceSource(config, policy, objective, untrained=True)
    store = source.open_store()
    before = len(store)
    with StopSignal() as stop:
        fill_store(source, store, data, steps, eval_data, evals, stop)
    say(f"{len(store) - before} completions computed, {len(store)} in {store.folder}")
    return store.folder
