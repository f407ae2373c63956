"""`dpo score`: implicit rewards and margins of preference pairs, as a table and as JSONL."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

import torch
from dpo_kernels import ranking_loss

from dpo.commands import ScoreConfig
from dpo.console import Bar, say, table
from dpo.cpu import keep_freed_memory
from dpo.data import PreferenceData
from dpo.errors import UserError
from dpo.inputs import check_first_bin, load_data, load_network, load_policy, objective_of, plan_of
from dpo.packing import Group
from dpo.reference import CachedReference
from dpo.steps import StepBatch, eval_steps


def score(config: ScoreConfig) -> list[dict[str, Any]]:
    """Scores every pair of --data, or every ranking; prints a table and writes --output.

    Returns:
        a record a pair, in input order: `row, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps`
        (sums over the completion's tokens, its end-of-sequence included), `chosen_reward, rejected_reward, margin`, and
        `chosen_tokens, rejected_tokens`. With --comparisons ranking a record a ranking: `row`; for each completion,
        best first, `completions` (its place in the row, from 0), `logps, ref_logps, rewards, tokens`; `loss`
        (Plackett-Luce, averaged over the orders of ties), `pairs`, and `accuracy`, the share of them in order.
    Raises:
        UserError: a model or the data cannot be used, or --output exists.
    """
    keep_freed_memory()
    output = Path(config.output) if config.output else None
    if output is not None and output.exists() and not config.overwrite:
        raise UserError(f"--output {output}: expected a new file (or --overwrite), found one that exists")
    policy = load_policy(config)
    data = load_data(config, policy, config.data, config.data_split)
    steps = eval_steps(data, plan_of(config, policy.model))
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
    _check_finite(f"--model {config.model}", data, logps)
    _check_finite(f"--reference {config.reference}", data, ref_logps)
    ranked = config.comparisons == "ranking"
    groups = list(_scored_groups(data, logps, ref_logps, config.beta))
    if ranked:
        records = [_ranking_record(group, config) for group in groups]
    else:
        # rows that were merged come back in input order
        records = sorted((r for group in groups for r in _pair_records(group)), key=lambda r: r["row"])
    if output is not None:
        _write(output, records)
        say(f"wrote {len(records)} {'rankings' if ranked else 'pairs'} to {output}")
    if ranked:
        _ranking_summary(records)
    else:
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


def _check_finite(name: str, data: PreferenceData, logps: CachedReference) -> None:
    """Raise UserError where a model gives a completion a log-prob that is not finite."""
    for index in range(len(data)):
        group = data[index]
        for completion in range(len(group.completions)):
            if not math.isfinite(total := logps.total(index, completion)):
                raise UserError(f"{name}: expected finite log-probs, found {total} in row {group.row}")


@dataclass(frozen=True)
class _Scored:
    """A group with the sums of its completions: log-probs, the reference's, rewards. pair_rows, sources: of
    `PreferenceData.sources`."""

    group: Group
    pair_rows: list[int]
    sources: list[int]
    logps: list[float]
    ref_logps: list[float]
    rewards: list[float]


def _scored_groups(
    data: PreferenceData, logps: CachedReference, ref_logps: CachedReference, beta: float
) -> Iterator[_Scored]:
    for index in range(len(data)):
        group = data[index]
        count = range(len(group.completions))
        yield _Scored(
            group,
            *data.sources(index),
            logps=[logps.total(index, c) for c in count],
            ref_logps=[ref_logps.total(index, c) for c in count],
            # the log ratio is summed token by token: the difference of two long sums loses digits
            rewards=[beta * logps.total(index, c, minus=ref_logps) for c in count],
        )


def _pair_records(scored: _Scored) -> Iterator[dict[str, Any]]:
    group, rewards = scored.group, scored.rewards
    for row, (chosen, rejected) in zip(scored.pair_rows, group.pairs, strict=True):
        yield {
            "row": row,
            "chosen_logps": scored.logps[chosen],
            "rejected_logps": scored.logps[rejected],
            "ref_chosen_logps": scored.ref_logps[chosen],
            "ref_rejected_logps": scored.ref_logps[rejected],
            "chosen_reward": rewards[chosen],
            "rejected_reward": rewards[rejected],
            "margin": rewards[chosen] - rewards[rejected],
            "chosen_tokens": len(group.completions[chosen]),
            "rejected_tokens": len(group.completions[rejected]),
        }


def _ranking_record(scored: _Scored, config: ScoreConfig) -> dict[str, Any]:
    group, rewards = scored.group, scored.rewards
    order = list(group.rankings[0])
    values = torch.tensor(rewards, dtype=torch.float64)
    loss = ranking_loss(
        values, torch.zeros_like(values), torch.tensor(group.rankings), beta=1.0, top_k=config.ranking_top_k
    ).loss
    margins = [rewards[w] - rewards[lo] for w, lo in group.pairs]
    return {
        "row": group.row,
        "completions": [scored.sources[c] for c in order],
        "logps": [scored.logps[c] for c in order],
        "ref_logps": [scored.ref_logps[c] for c in order],
        "rewards": [rewards[c] for c in order],
        "tokens": [len(group.completions[c]) for c in order],
        "loss": loss.item(),
        "pairs": len(margins),
        "accuracy": sum(0.5 * ((m > 0) + (m >= 0)) for m in margins) / len(margins),
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


def _ranking_summary(records: Sequence[dict[str, Any]]) -> None:
    pairs = sum(r["pairs"] for r in records)
    accuracy = sum(r["accuracy"] * r["pairs"] for r in records) / pairs
    columns = {
        "loss": [r["loss"] for r in records],
        "reward of the best": [r["rewards"][0] for r in records],
        "reward of the worst": [r["rewards"][-1] for r in records],
        "completions": [float(len(r["rewards"])) for r in records],
    }
    rows = [(name, mean(values), pstdev(values)) for name, values in columns.items()]
    title = f"{len(records)} rankings, {pairs} pairs, reward accuracy {accuracy:.4f} over pairs"
    table(title, ("", "mean", "standard deviation"), rows)
