"""Losses from the command line: what a step logs against the plain formula, state that resumes, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dpo_kernels import LOSSES
from dpo_kernels.reference_losses import Completions, sum_of_losses
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dpo.baseline import RunningBaseline
from dpo.cli import main
from dpo.engine import forward_backward, forward_only
from dpo.loss import Objective
from dpo.losses import flags_of
from dpo.lossflags import LossFlags
from dpo.metrics import read_json_lines
from dpo.model import prepare
from dpo.reference import OnlineReference, no_reference
from dpo.steps import StepPlan, build_step
from tests.train.toy import random_groups, toy_config, write_model, write_pairs

PAIRS = 8
RUNS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    *((name, (), {}) for name in LOSSES if name != "bco_pair"),
    ("bco_pair", ("--bco-baseline", "none"), {}),
    ("sigmoid:1,sft:0.1", (), {}),
]
OPTIONS: list[tuple[str, tuple[str, ...], dict[str, Any]]] = [
    ("sigmoid", ("--label-smoothing", "0.2"), {"label_smoothing": 0.2}),
    ("hinge", ("--f-divergence", "js"), {"f_divergence": "js"}),
    ("robust", ("--f-divergence", "alpha", "--f-alpha", "0.3"), {"f_divergence": "alpha", "f_alpha": 0.3}),
    ("ipo", ("--token-reduction", "sum"), {"token_reduction": "sum"}),
    ("discopop", ("--discopop-tau", "0.5"), {"discopop_tau": 0.5}),
    ("simpo", ("--gamma", "1.2"), {"gamma": 1.2}),
    ("alphapo", ("--alphapo-alpha", "-0.5"), {"alphapo_alpha": -0.5}),
    ("cpo", ("--cpo-alpha", "0.2"), {"cpo_alpha": 0.2}),
    ("unlikelihood", ("--unlikelihood-alpha", "0.5"), {"unlikelihood_alpha": 0.5}),
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A policy, another model as reference, one step's pairs, and their scores."""
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model")
    write_model(folder / "other", seed=5)
    write_pairs(folder / "pairs.jsonl", count=PAIRS)
    words = ["score", "--model", str(folder / "model"), "--reference", str(folder / "other"), "--no-check-sharing"]
    main([*words, "--data", str(folder / "pairs.jsonl"), "--output", str(folder / "scores.jsonl")])
    return folder


def train(toy: Path, output: Path, loss: str, *flags: str, steps: int = 1) -> list[dict]:
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    if LossFlags(loss=loss).pair_call().reference:
        words += ["--reference-model", str(toy / "other")]
    words += ["--pairs-per-step", str(PAIRS), "--max-steps", str(steps), "--lr", "1e-3", "--warmup-steps", "0"]
    main([*words, "--no-check-sharing", "--loss", loss, *flags])
    return read_json_lines(output / "metrics.jsonl")


def by_hand(toy: Path, loss: str, **options: Any) -> float:
    """The mean over the pairs of the formula, from what `dpo score` wrote."""
    records = read_json_lines(toy / "scores.jsonl")
    sides = []
    for side in ("chosen", "rejected"):
        columns = (f"{side}_logps", f"ref_{side}_logps", f"{side}_tokens")
        sides.append(Completions(*(torch.tensor([r[c] for r in records], dtype=torch.float64) for c in columns)))
    won, lost = sides
    return sum_of_losses(loss, won, lost, 0.1, options).mean().item()


SLOW = [pytest.param(*run, marks=pytest.mark.slow) for run in OPTIONS]


@pytest.mark.parametrize(
    ("loss", "flags", "options"), [*RUNS, *SLOW], ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_first_step_logs_the_formula(toy, tmp_path, loss, flags, options):
    (record,) = train(toy, tmp_path / "run", loss, *flags)
    assert record["loss"] == pytest.approx(by_hand(toy, loss, **options), rel=2e-5, abs=2e-6)
    assert record["grad_norm"] > 0 or loss in ("hinge", "discopop")
    assert not record["skipped"]


def test_bco_starts_from_the_mean_reward_of_its_first_step(toy, tmp_path):
    (record,) = train(toy, tmp_path / "run", "bco_pair")
    baseline = (record["chosen_reward"] + record["rejected_reward"]) / 2
    assert record["loss"] == pytest.approx(by_hand(toy, "bco_pair", bco_baseline=baseline), rel=2e-5)


@pytest.mark.parametrize(
    "flags", [("--ld-alpha", "0.3"), ("--ld-alpha", "0.3", "--no-ld-reference"), ("--wpo",)], ids=" ".join
)
def test_token_weights_and_pair_weights_reach_the_loss(toy, tmp_path, flags):
    plain, changed = (train(toy, tmp_path / str(k), "sigmoid", *f)[0] for k, f in enumerate(((), flags)))
    assert abs(plain["loss"] - changed["loss"]) > 1e-4


def test_bco_resumes_with_its_baseline(toy, tmp_path):
    """The mean over the steps before is in the checkpoint: the loss after it, and the weights, are the same bits."""
    whole = tmp_path / "whole"
    straight = train(toy, whole, "bco_pair", "--save-every", "2", steps=4)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "model")
    again = train(toy, resumed, "bco_pair", "--save-every", "2", *RESUME, steps=4)
    assert [r["loss"] for r in again] == [r["loss"] for r in straight]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


RESUME = ("--resume", "auto")


def test_the_running_baseline():
    baseline = RunningBaseline(torch.device("cpu"))
    assert baseline.mean == 0.0
    baseline.update(torch.tensor([1.0, 2.0, float("nan"), float("inf")]))
    baseline.update(torch.tensor([6.0]))
    assert baseline.mean == 3.0
    other = RunningBaseline(torch.device("cpu"))
    other.load_state_dict(baseline.state_dict())
    other.update(torch.tensor([7.0]))
    assert (other.mean, baseline.mean) == (4.0, 3.0)


def fails(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", "m", "--data", "d", *words])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--loss", "dpo"), "--loss: expected one of sigmoid, robust, "),
        (("--loss", "sigmoid:0"), "--loss: expected a weight above 0 after sigmoid:, found '0'"),
        (
            ("--loss", "hinge", "--label-smoothing", "0.1"),
            "--label-smoothing: loss 'hinge' does not use it",
        ),
        (("--loss", "simpo", "--f-divergence", "js"), "--f-divergence: loss 'simpo' does not use it"),
        (("--f-alpha", "0.5"), "--f-alpha: expected with f_divergence 'alpha'"),
        (("--gamma", "0.5"), "--gamma: loss 'sigmoid' does not use it"),
        (("--token-reduction", "mean"), "--token-reduction: loss 'sigmoid' does not use it"),
        (("--bco-baseline", "none"), "--bco-baseline: loss 'sigmoid' does not use it"),
        (("--loss", "aot", "--wpo"), "--wpo: loss 'aot' does not use it"),
        (("--loss", "aot", "--reduction", "prompts"), "--reduction: expected pairs with --loss aot"),
        (("--loss", "simpo", "--reference", "cached"), "--reference: expected none with --loss simpo"),
        (("--loss", "simpo", "--reference-model", "m"), "--reference-model: expected none with --loss simpo"),
        (("--reference", "none"), "--reference: expected a reference for --loss sigmoid"),
        (("--no-ld-reference",), "--ld-reference: expected with ld_alpha below 1"),
        (("--ld-alpha", "2"), "--ld-alpha: expected 0 <= value <= 1, found 2.0"),
    ],
    ids=str,
)
def test_what_a_loss_does_not_use_is_refused(capsys, flags, message):
    assert message in fails(capsys, *flags)


def test_the_table_prints_every_loss_and_every_flag_exists(capsys):
    main(["losses"])
    out = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    usage = capsys.readouterr().out
    for name, entry in LOSSES.items():
        assert f" {name} " in out
        assert name in usage
        for flag in flags_of(entry.options):
            assert flag.split()[0] in usage
    assert "arXiv:2305.18290" in out
    main(["losses", "--loss", "ipo"])
    assert " simpo " not in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["losses", "--loss", "dpo"])
    assert stop.value.code == 2


# The promise of a step in float64: loss and gradient do not depend on bins, phases or splits, for losses whose gradient
# differs from token to token, or from pair to pair of one completion.

INVARIANT: list[tuple[str, dict[str, Any]]] = [
    ("ipo", {}),
    ("sigmoid:1,sft:0.2", {}),
    ("sigmoid", {"ld_alpha": 0.3}),
    ("sigmoid", {"wpo": True}),
    ("simpo", {}),
]


def network(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(toy_config()).double()
    prepare(model, "shared")
    return model


def run_step(objective: Objective, plan: StepPlan) -> tuple[dict[str, float], torch.Tensor]:
    model, groups = network(0), random_groups(count=6)
    ref_logps = OnlineReference(network(1), objective) if objective.call.reference else no_reference
    step = build_step(groups, range(len(groups)), plan)
    before = None if objective.baseline is None else objective.baseline.mean
    forward_only(model, step, ref_logps, objective)
    assert objective.baseline is None or objective.baseline.mean == before
    result = forward_backward(model, step, ref_logps, objective)
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return result.sums.read(), grads


@pytest.mark.parametrize(("loss", "options"), INVARIANT, ids=str)
def test_loss_and_gradient_do_not_depend_on_bins_and_phases(loss, options):
    objective = Objective(loss=loss, beta=0.3, options=options)
    whole = run_step(objective, StepPlan(token_budget=10_000))
    for plan in (StepPlan(token_budget=45), StepPlan(token_budget=120, two_phase=True)):
        means, grads = run_step(objective, plan)
        assert means["loss"] == pytest.approx(whole[0]["loss"], rel=1e-8)
        assert means["margin"] == pytest.approx(whole[0]["margin"], rel=1e-7)
        assert (grads - whole[1]).norm() <= 1e-6 * whole[1].norm()


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "bco_pair"])
def test_losses_of_the_whole_step_do_not_depend_on_bins(loss):
    objective = Objective(loss=loss, beta=0.3)
    results = []
    for budget in (10_000, 45):
        if loss == "bco_pair":
            objective = replace(objective, baseline=RunningBaseline(torch.device("cpu")))
        results.append(run_step(objective, StepPlan(token_budget=budget, two_phase=True)))
    (whole, grads), (means, parts) = results
    assert means["loss"] == pytest.approx(whole["loss"], rel=1e-8)
    assert (parts - grads).norm() <= 1e-6 * grads.norm()
    assert objective.baseline is None or objective.baseline.mean.item() == pytest.approx(
        (whole["chosen_reward"] + whole["rejected_reward"]) / 2, rel=1e-9
    )
