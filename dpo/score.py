"""`dpo score`: implicit rewards and margins of preference pairs, as a table and as JSONL."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpo.config import ScoreConfig
from dpo.console import Bar, say, table
from dpo.cpu import keep_freed_memory
from dpo.errors import UserError
from dpo.inputs import check_first_bin, load_data, load_network, load_policy, objective_of, plan_of
from dpo.packing import Group
from dpo.reference import CachedReference
from dpo.steps import Preferences, StepBatch, eval_steps


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores every pair of --data; prints a table and writes --output.

    Returns:
        a record a pair, in input order: `row, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps`
        (sums over the completion's tokens, its end-of-sequence included), `chosen_reward, rejected_reward, margin`, and
        `chosen_tokens, rejected_tokens`.
    Raises:
        UserError: a model or the data cannot be used, or --output exists.
    """
    keep_freed_memory()
    output = Path(config.output) if config.output else None
    if output is not None and output.exists() and not config.overwrite:
        raise UserError(f"--output {output}: expected a new file (or --overwrite), found one that exists")
    policy = load_policy(config)
    data = load_data(config, policy, config.data, config.data_split)
    steps = eval_steps(data, plan_of(config))
    check_first_bin(config, policy.model, data, range(min(len(data), 8)))
    vocabulary = policy.model.get_output_embeddings().weight.shape[0]
    logps = _all_logps("policy", config, policy.model, steps, policy.device)
    del policy
    reference = load_network(config, config.reference, flag="--reference")
    if reference.get_output_embeddings().weight.shape[0] != vocabulary:
        raise UserError(
            f"--reference {config.reference}: expected the policy's vocabulary of {vocabulary}, found another"
        )
    ref_logps = _all_logps("reference", config, reference, steps, next(reference.parameters()).device)
    records = list(_records(data, logps, ref_logps, config.beta))
    if output is not None:
        _write(output, records)
        say(f"wrote {len(records)} pairs to {output}")
    _summary(records)
    return records


def _all_logps(
    label: str, config: ScoreConfig, model: Any, steps: Sequence[StepBatch], device: torch.device
) -> CachedReference:
    model.eval()
    held = CachedReference()
    with Bar(label, len(steps), log_every=10) as bar:
        held.fill(
            model,
            steps,
            objective_of(config),
            device,
            lambda step: bar.advance(pairs=step.num_pairs, tokens=step.num_tokens),
        )
    return held


def _records(data: Preferences, logps: CachedReference, ref_logps: CachedReference, beta: float) -> Any:
    for index in range(len(data)):
        group: Group = data[index]
        sums = [logps.total(index, c) for c in range(len(group.completions))]
        ref_sums = [ref_logps.total(index, c) for c in range(len(group.completions))]
        # the log ratio is summed token by token: the difference of two long sums loses digits
        rewards = [beta * logps.total(index, c, minus=ref_logps) for c in range(len(group.completions))]
        for chosen, rejected in group.pairs:
            yield {
                "row": group.row,
                "chosen_logps": sums[chosen],
                "rejected_logps": sums[rejected],
                "ref_chosen_logps": ref_sums[chosen],
                "ref_rejected_logps": ref_sums[rejected],
                "chosen_reward": rewards[chosen],
                "rejected_reward": rewards[rejected],
                "margin": rewards[chosen] - rewards[rejected],
                "chosen_tokens": len(group.completions[chosen]),
                "rejected_tokens": len(group.completions[rejected]),
            }


def _write(output: Path, records: Sequence[dict[str, Any]]) -> None:
    aside = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        aside.replace(output)
    except OSError as error:
        raise UserError(f"--output {output}: expected a file to write to, found: {error}") from error


def _summary(records: Sequence[dict[str, Any]]) -> None:
    columns = {
        name: torch.tensor([r[name] for r in records], dtype=torch.float64) for name in records[0] if name != "row"
    }
    margins = columns["margin"]
    accuracy = ((margins > 0).double() + 0.5 * (margins == 0).double()).mean().item()
    rows = [
        (name.replace("_", " "), values.mean().item(), values.std(correction=0).item())
        for name, values in columns.items()
    ]
    table(f"{len(records)} pairs, reward accuracy {accuracy:.4f}", ("", "mean", "standard deviation"), rows)
