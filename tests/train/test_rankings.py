"""Rankings and merged prompts through the trainer: the loss of the paper, the same however it is packed (float64), and
from the command line to the files."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from dpo.cli import main
from dpo.engine import evaluate, forward_backward, forward_only
from dpo.loss import Objective
from dpo.metrics import read_json_lines
from dpo.model import prepare
from dpo.packing import Group
from dpo.reference import OnlineReference
from dpo.steps import StepPlan, build_step, eval_steps
from tests.train.toy import (
    GRAD_BOUND,
    LOGP_BOUND,
    Groups,
    float64_model,
    random_groups,
    write_model,
    write_pairs,
)

CPU = torch.device("cpu")
BASE = StepPlan(token_budget=10_000)


def ranked_groups(count: int = 9, ties: bool = True) -> Groups:
    """Groups of 2 to 4 completions, each with its ranking; every third with a tie, in both orders."""
    groups = Groups()
    for k, group in enumerate(random_groups(count)):
        order = random.Random(k).sample(range(len(group.completions)), len(group.completions))
        orders = [order, [order[1], order[0], *order[2:]]] if ties and k % 3 == 0 and len(order) > 2 else [order]
        pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
        pairs = pairs[len(orders) - 1 :]  # not the tied two, which come first
        groups.append(replace(group, pairs=pairs, rankings=orders))
    return groups


def run(
    groups: Groups,
    plan: StepPlan = BASE,
    objective: Objective = Objective(beta=0.3),  # noqa: B008
) -> tuple[dict[str, float], torch.Tensor, dict[str, float]]:
    """Metrics, gradient, and the metrics without gradient of one step over all groups."""
    model, reference = float64_model(0), float64_model(1)
    for network in (model, reference):
        prepare(network, plan.layout)
    ref_logps = OnlineReference(reference, objective)
    step = build_step(groups, range(len(groups)), plan)
    result = forward_backward(model, step, ref_logps, objective)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return result.sums.read(), gradient, forward_only(model, step, ref_logps, objective).sums.read()


def rewards_of(groups: Groups, beta: float) -> tuple[list[torch.Tensor], LlamaForCausalLM]:
    """Rewards of every group's completions from plain forwards, with gradients for the returned policy."""
    model, reference = float64_model(0), float64_model(1)

    def logp(network: LlamaForCausalLM, prompt: list[int], completion: list[int]) -> torch.Tensor:
        logits = network(torch.tensor([[*prompt, *completion]])).logits[0].double()
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        return rows.gather(1, torch.tensor(completion)[:, None]).sum()

    found = []
    for group in groups:
        prompt = list(group.prompt)
        delta = [logp(model, prompt, list(y)) - logp(reference, prompt, list(y)).detach() for y in group.completions]
        found.append(beta * torch.stack(delta))
    return found, model


def plackett_luce(rewards: torch.Tensor, order: Sequence[int], top: int | None = None) -> torch.Tensor:
    """-log of the product over places of e^(r of the place) / sum of e^(r of that place and all behind it)."""
    probability = torch.ones((), dtype=torch.float64)
    for place in range(len(order) if top is None else top):
        behind = torch.stack([rewards[index].exp() for index in order[place:]])
        probability = probability * behind[0] / behind.sum()
    return -probability.log()


@pytest.mark.parametrize("top_k", [None, 1, 2])
@pytest.mark.parametrize("reduction", ["pairs", "prompts"])
def test_the_loss_is_the_mean_of_the_papers_over_rankings(top_k: int | None, reduction: Any) -> None:
    groups = ranked_groups()
    metrics, gradient, _ = run(groups, replace(BASE, reduction=reduction), Objective(beta=0.3, top_k=top_k))
    rewards, model = rewards_of(groups, 0.3)
    losses = [
        torch.stack([plackett_luce(r, order, top_k and min(top_k, len(order))) for order in group.rankings]).mean()
        for r, group in zip(rewards, groups, strict=True)
    ]
    loss = torch.stack(losses).mean()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-7)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (gradient - expected).norm() / expected.norm() < GRAD_BOUND
    margins = torch.stack([r[w] - r[lo] for r, g in zip(rewards, groups, strict=True) for w, lo in g.pairs])
    assert metrics["pairs"] == len(margins)
    assert metrics["accuracy"] == pytest.approx((margins > 0).double().mean().item())
    assert metrics["margin"] == pytest.approx(margins.mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"token_budget": 100},
        {"token_budget": 45},  # groups of several completions do not fit: parts that repeat the prompt
        {"two_phase": True},
        {"two_phase": True, "token_budget": 45},
        {"layout": "packed", "token_budget": 60},
        {"layout": "padded", "token_budget": 90},
    ],
    ids=str,
)
def test_loss_and_gradient_do_not_depend_on_how_it_is_packed(change: dict[str, Any]) -> None:
    groups = ranked_groups()
    loss, gradient, _ = run(groups)
    plan = replace(BASE, **change)
    step = build_step(groups, range(len(groups)), plan)
    if change.get("token_budget", 99) < 50:
        assert step.coupled is not None
        assert step.coupled.rankings is not None
        assert len(step.coupled.bins) > 1
    other, other_gradient, other_eval = run(groups, plan)
    for name in ("loss", "accuracy", "margin", "chosen_reward", "chosen_logps_per_token"):
        assert other[name] == pytest.approx(loss[name], rel=LOGP_BOUND, abs=LOGP_BOUND), name
        assert other_eval[name] == pytest.approx(loss[name], rel=LOGP_BOUND, abs=LOGP_BOUND), name
    assert (other_gradient - gradient).norm() / gradient.norm() < GRAD_BOUND


def test_rankings_of_two_are_pairs() -> None:
    pairs = random_groups(completions=(2, 2))
    rankings = Groups(replace(group, rankings=[list(group.pairs[0])]) for group in pairs)
    (loss, gradient, _), (ranked_loss, ranked_gradient, _) = run(pairs), run(rankings)
    assert ranked_loss == pytest.approx(loss, rel=1e-12)
    assert (ranked_gradient - gradient).norm() / gradient.norm() < 1e-12


def test_evaluation_in_chunks_is_the_mean_over_all_rankings() -> None:
    groups, objective = ranked_groups(), Objective(beta=0.3)
    model, reference = float64_model(0), float64_model(1)
    for network in (model, reference):
        prepare(network, "shared")
    whole, chunks = (
        evaluate(model, eval_steps(groups, BASE, size), OnlineReference(reference, objective), objective, CPU)
        for size in (512, 2)
    )
    assert chunks == pytest.approx(whole, rel=1e-8)
    assert whole["loss"] == pytest.approx(run(groups)[0]["loss"], rel=1e-8)


@pytest.mark.parametrize("budget", [10_000, 60])
def test_merged_rows_have_the_loss_and_gradient_of_the_rows_apart(budget: int) -> None:
    whole = random_groups(5, completions=(3, 4))
    merged = Groups(replace(group, pairs=[*group.pairs, group.pairs[0]]) for group in whole)
    apart = Groups(
        Group(group.prompt, [group.completions[w], group.completions[lo]], [(0, 1)])
        for group in merged
        for w, lo in group.pairs
    )
    (loss, gradient, _), (loss_apart, gradient_apart, _) = run(merged, replace(BASE, token_budget=budget)), run(apart)
    assert loss == pytest.approx(loss_apart, rel=LOGP_BOUND)
    assert (gradient - gradient_apart).norm() / gradient_apart.norm() < GRAD_BOUND


# --- From the command line --------------------------------------------------------------------------------------------


def write_scored(path: Path, count: int = 20, seed: int = 0) -> Path:
    """Prompts with four completions, the more cheerful the better; every fifth has a tie."""
    draw = random.Random(seed)
    words = ["great", "good", "fair", "poor"]
    with path.open("w") as file:
        for k in range(count):
            scores = [9.0, 7.0, 7.0 if k % 5 == 0 else 4.0, 1.0]
            order = draw.sample(range(4), 4)
            completions = [f" {words[i]} {draw.choice('xyz') * draw.randint(1, 4)}" for i in order]
            row = {"prompt": f"{k}:", "completions": completions, "scores": [scores[i] for i in order]}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model")
    write_scored(folder / "train.jsonl")
    write_scored(folder / "held_out.jsonl", count=7, seed=1)
    write_pairs(folder / "pairs.jsonl", count=12)
    return folder


def words(toy: Path, output: Path, *flags: str) -> list[str]:
    data = ["--data", str(toy / "train.jsonl"), "--eval-data", str(toy / "held_out.jsonl")]
    few = ["--pairs-per-step", "5", "--lr", "1e-3", "--warmup-steps", "2", "--max-steps", "3"]
    return ["train", "--model", str(toy / "model"), *data, "--output", str(output), *few, *flags]


def train(toy: Path, output: Path, *flags: str) -> list[dict[str, Any]]:
    main(words(toy, output, *flags))
    return read_json_lines(output / "metrics.jsonl")


PAIRS_OF_A_STEP = {"all": 5, "best-vs-worst": 5, "best-vs-rest": 3, "adjacent": 3, "random": 5}


@pytest.mark.parametrize("kind", ["best-vs-worst", "best-vs-rest", "adjacent", "random"])
def test_comparisons_reach_the_step(toy: Path, tmp_path: Path, kind: str) -> None:
    metrics = train(toy, tmp_path / "run", "--comparisons", kind)
    per_prompt = {"best-vs-worst": 1, "best-vs-rest": 3, "adjacent": 3, "random": 1}[kind]
    # a step holds whole prompts, up to five pairs
    assert metrics[0]["pairs"] in range(5 // per_prompt * per_prompt - 1, 6)
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert read_json_lines(tmp_path / "run" / "eval.jsonl")[0]["pairs"] in range(7 * per_prompt - 2, 7 * per_prompt + 1)


@pytest.fixture(scope="module")
def ranked(toy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run = tmp_path_factory.mktemp("runs") / "ranked"
    # a store of its own: log-probs of another run's bins differ in the last bit
    return run, train(toy, run, "--comparisons", "ranking", "--reference-cache", str(run.parent / "store"))


def test_a_ranking_run_starts_at_the_log_of_the_number_of_orders(ranked: tuple[Path, list[dict[str, Any]]]) -> None:
    run, metrics = ranked
    # policy = reference: every order of four is equally likely, and a step is five rankings
    assert metrics[0]["loss"] == pytest.approx(math.log(24), rel=1e-6)
    assert metrics[0]["margin"] == 0.0
    assert metrics[0]["pairs"] in range(5 * 5, 5 * 6 + 1)
    evals = read_json_lines(run / "eval.jsonl")
    assert evals[-1]["loss"] < evals[0]["loss"]


@pytest.mark.parametrize("flags", [("--token-budget", "30"), ("--reference", "online")], ids=" ".join)
def test_a_ranking_run_does_not_depend_on_how_it_is_computed(
    toy: Path, tmp_path: Path, ranked: tuple[Path, list[dict[str, Any]]], flags: tuple[str, ...]
) -> None:
    for ours, theirs in zip(train(toy, tmp_path / "run", "--comparisons", "ranking", *flags), ranked[1], strict=True):
        for name in ("loss", "margin", "grad_norm", "chosen_logps_per_token"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), (ours["step"], name)


def test_top_k_changes_the_loss(toy: Path, tmp_path: Path) -> None:
    first = train(toy, tmp_path / "run", "--comparisons", "ranking", "--ranking-top-k", "1")[0]
    assert first["loss"] == pytest.approx(math.log(4), rel=1e-6)


def test_rankings_are_scored_as_evaluation_sees_them(
    toy: Path, ranked: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run, _ = ranked
    score = ["score", "--model", str(run / "model"), "--reference", str(toy / "model"), "--comparisons", "ranking"]
    main([*score, "--data", str(toy / "held_out.jsonl"), "--output", str(tmp_path / "scores.jsonl")])
    records, last = read_json_lines(tmp_path / "scores.jsonl"), read_json_lines(run / "eval.jsonl")[-1]
    rows = [json.loads(line) for line in (toy / "held_out.jsonl").read_text().splitlines()]
    assert [record["row"] for record in records] == list(range(1, 8))
    for record, row in zip(records, rows, strict=True):
        scores = [row["scores"][c] for c in record["completions"]]
        assert scores == sorted(scores, reverse=True)
        best_first = torch.tensor(record["rewards"], dtype=torch.float64)
        orders = [o for o in permutations(range(4)) if all(scores[a] >= scores[b] for a, b in zip(o, o[1:]))]  # noqa: B905, RUF007
        expected = torch.stack([plackett_luce(best_first, order) for order in orders]).mean()
        assert record["loss"] == pytest.approx(expected.item(), rel=1e-9)
    assert sum(r["loss"] for r in records) / 7 == pytest.approx(last["loss"], abs=1e-5)
    pairs = sum(r["pairs"] for r in records)
    assert pairs == last["pairs"]
    assert sum(r["accuracy"] * r["pairs"] for r in records) / pairs == pytest.approx(last["accuracy"])
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    policy = AutoModelForCausalLM.from_pretrained(run / "model").double()
    text = rows[0]["completions"][records[0]["completions"][0]]
    prompt = tokenizer(rows[0]["prompt"]).input_ids
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    with torch.no_grad():
        logps = policy(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert records[0]["logps"][0] == pytest.approx(logps.gather(1, torch.tensor(ids)[:, None]).sum().item(), rel=1e-5)
    assert records[0]["tokens"][0] == len(ids)


def test_pairs_are_held_out_data_of_a_ranking_run(toy: Path, tmp_path: Path) -> None:
    train(toy, tmp_path / "run", "--comparisons", "ranking", "--eval-data", str(toy / "pairs.jsonl"))
    first = read_json_lines(tmp_path / "run" / "eval.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["pairs"] == 12


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--comparisons", "ranking", "--label-smoothing", "0.1"),
            "--label-smoothing: expected the default beside --comparisons",
        ),
        (("--comparisons", "ranking", "--min-score-gap", "1"), "--min-score-gap: expected 0 with --comparisons"),
        (("--ranking-top-k", "2"), "--ranking-top-k: expected --comparisons ranking"),
        (("--min-score-gap", "99"), "no two scores 99 apart"),
        (("--comparisons", "sideways"), "--comparisons"),
        (("--comparisons", "adjacent", "--data", "PAIRS"), "--comparisons adjacent: expected --data with scores"),
        (("--min-score-gap", "1", "--data", "PAIRS"), "--min-score-gap: expected --data with scores or ranks"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(
    toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    flags = tuple(flag.replace("PAIRS", str(toy / "pairs.jsonl")) for flag in flags)
    with pytest.raises(SystemExit) as stop:
        main(words(toy, tmp_path / "run", *flags))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_merged_prompts_from_the_command_line(toy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (toy / "train.jsonl").read_text().splitlines()]
    with (tmp_path / "flat.jsonl").open("w") as file:
        for row in rows[:6]:
            best = max(range(4), key=lambda i: row["scores"][i])
            for other in set(range(4)) - {best}:
                chosen, rejected = row["completions"][best], row["completions"][other]
                file.write(json.dumps({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}) + "\n")
    flags = "--data", str(tmp_path / "flat.jsonl"), "--pairs-per-step", "18", "--max-steps", "2"
    merged = train(toy, tmp_path / "merged", *flags)
    # a merged group holds a quarter of a step: all three pairs of a prompt
    assert "merged 12 rows into the group of an earlier row with the same prompt; 12 of" in capsys.readouterr().out
    apart = train(toy, tmp_path / "apart", *flags, "--no-merge-prompts")
    assert "into the group of an earlier row" not in capsys.readouterr().out
    for ours, theirs in zip(merged, apart, strict=True):  # each step is the whole file
        for name in ("loss", "margin", "grad_norm", "pairs"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), (ours["step"], name)
    score = ["score", "--model", str(tmp_path / "merged" / "model"), "--reference", str(toy / "model")]
    for name, flag in (("merged", "--merge-prompts"), ("apart", "--no-merge-prompts")):
        main([*score, "--data", str(tmp_path / "flat.jsonl"), "--output", str(tmp_path / f"{name}.jsonl"), flag])
    merged, apart = (read_json_lines(tmp_path / f"{name}.jsonl") for name in ("merged", "apart"))
    assert [record["row"] for record in merged] == list(range(1, 19))
    for ours, theirs in zip(merged, apart, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
