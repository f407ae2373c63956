"""Precision, optimizers, schedules and averages, from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo.updater
from dpo.cli import main
from dpo.data import load_preferences
from dpo.engine import forward_backward
from dpo.loss import Objective
from dpo.metrics import read_json_lines
from dpo.model import load_model, load_tokenizer, prepare
from dpo.optim import apply_update, build_optimizer
from dpo.reference import OnlineReference
from dpo.steps import StepPlan, build_step
from tests.train.toy import random_groups, write_toy


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), pairs=14, held_out=3)


def words(toy: Path, run: Path, *flags: str) -> list[str]:
    found = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(run)]
    return [*found, "--pairs-per-step", "4", "--lr", "1e-3", "--warmup-steps", "1", "--no-check-sharing", *flags]


def train(toy: Path, run: Path, *flags: str) -> list[dict]:
    main(words(toy, run, *flags))
    return read_json_lines(run / "metrics.jsonl")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def refused(toy: Path, tmp_path: Path, capsys, *flags: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(words(toy, tmp_path / "run", *flags))
    assert stop.value.code == 2
    assert not (tmp_path / "run").exists()
    return capsys.readouterr().err


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("plain") / "run"
    return train(toy, run), weights(run)


SGD = "--optimizer", "sgd", "--lr", "0.1"  # RMSprop would amplify the rounding of gradients that are nearly zero


@pytest.fixture(scope="module")
def sgd(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("sgd") / "run"
    return train(toy, run, *SGD), _flat(weights(run))


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.float().flatten() for _, tensor in sorted(tensors.items())])


@pytest.mark.parametrize(
    ("flags", "roundings"),
    [
        (("--dtype", "bf16"), 0),
        (("--dtype", "fp16"), 0),
        (("--dtype", "fp16", "--two-phase"), 0),
        (("--dtype", "bf16", "--param-dtype", "bf16"), 2),
        (("--dtype", "bf16", "--param-dtype", "bf16", "--bf16-update", "random"), 6),
        (("--dtype", "bf16", "--param-dtype", "bf16", "--reference", "online"), 2),
    ],
    ids=str,
)
def test_every_precision_starts_at_zero_and_follows_fp32_and_resumes_exactly(toy, tmp_path, sgd, flags, roundings):
    run = tmp_path / "run"
    metrics = train(toy, run, *SGD, *flags, "--save-every", "2")
    assert metrics[0]["margin"] == 0.0
    assert not any(record["skipped"] for record in metrics)
    stored = torch.bfloat16 if "--param-dtype" in flags else torch.float32
    assert all(tensor.dtype == stored for tensor in weights(run).values())
    final, start = _flat(weights(run)), _flat(load_file(toy / "model" / "model.safetensors"))
    eps = torch.finfo(torch.float16 if "fp16" in flags else torch.bfloat16).eps
    rounding = (start - start.to(stored).float()).norm()
    assert (final - sgd[1]).norm() <= 4 * eps * (sgd[1] - start).norm() + roundings * rounding
    for record, exact in zip(metrics, sgd[0], strict=True):
        assert record["loss"] == pytest.approx(exact["loss"], rel=4 * eps)
    if "fp16" in flags:
        assert [record["loss_scale"] for record in metrics] == [2.0**16] * len(metrics)
    (run / "finished.json").unlink()
    again = train(toy, run, *SGD, *flags, "--save-every", "2", "--resume", "must")
    assert [r["loss"] for r in again] == [r["loss"] for r in metrics]
    assert torch.equal(_flat(weights(run)), final)


def test_an_fp16_overflow_halves_the_scale_and_is_no_fault(toy, tmp_path, monkeypatch, capsys):
    scale = dpo.updater.LossScale
    monkeypatch.setattr(dpo.updater, "LossScale", lambda device: scale(device, start=2.0**40))
    metrics = train(toy, tmp_path / "run", "--dtype", "fp16", "--max-steps", "30", "--max-skipped", "2")
    skipped = [record["skipped"] for record in metrics]
    assert sum(skipped) > 5
    assert skipped == sorted(skipped, reverse=True)
    scales = [record["loss_scale"] for record in metrics]
    assert scales[: sum(skipped) + 1] == [2.0 ** (40 - k) for k in range(sum(skipped) + 1)]
    out = capsys.readouterr().out
    assert "step 0: fp16 gradients overflowed at a loss scale of 1.09951e+12, which is halved" in out


@pytest.mark.parametrize("name", ["adam", "sgd", "adafactor", "nadam"])
def test_an_optimizer_by_name_reaches_the_update_and_resumes_exactly(toy, tmp_path, name, plain):
    run = tmp_path / "run"
    first = train(toy, run, "--optimizer", name, "--save-every", "2")
    assert [r["loss"] for r in first] != [r["loss"] for r in plain[0]]
    held = weights(run)
    (run / "finished.json").unlink()
    train(toy, run, "--optimizer", name, "--save-every", "2", "--resume", "must")
    assert all(torch.equal(tensor, held[key]) for key, tensor in weights(run).items())


def test_options_of_the_optimizer(toy, tmp_path, capsys, plain):
    alpha = train(toy, tmp_path / "a", "--optimizer-options", "{alpha: 0.5}")
    assert alpha[0]["loss"] == plain[0][0]["loss"]
    assert abs(alpha[-1]["loss"] - plain[0][-1]["loss"]) > 1e-4
    (tmp_path / "run.yaml").write_text("optimizer_options: {alpha: 0.5, eps: 1.0e-8}\n")
    same = train(toy, tmp_path / "b", "--config", str(tmp_path / "run.yaml"))
    assert [r["loss"] for r in same] == [r["loss"] for r in alpha]
    again = tmp_path / "again.yaml"
    shutil.copy(tmp_path / "b" / "config.yaml", again)
    main(["train", "--config", str(again), "--output", str(tmp_path / "c")])
    assert [r["loss"] for r in read_json_lines(tmp_path / "c" / "metrics.jsonl")] == [r["loss"] for r in alpha]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--optimizer-options", "{momentum: 1}"), "expected options of rmsprop (alpha, eps), found 'momentum'"),
        (("--optimizer-options", "fast"), "--optimizer-options: expected a mapping such as"),
        (("--optimizer-options", "{"), "--optimizer-options: expected YAML, found"),
        (("--optimizer", "lbfgs"), "--optimizer"),
        (("--optimizer", "rprop", "--weight-decay", "1"), "--weight-decay: expected an optimizer that has it"),
        (("--param-dtype", "bf16"), "--param-dtype bf16: expected --dtype bf16 beside it, found fp32"),
        (("--bf16-update", "random"), "--bf16-update: expected --param-dtype bf16 beside it, found fp32"),
        (("--schedule", "constant"), "--warmup-steps: expected none with --schedule constant"),
        (("--lr-end", "0.1"), "--lr-end: expected --schedule linear or cosine beside it, found paper"),
        (("--schedule", "linear", "--lr-end", "2"), "--lr-end: expected 0 <= value <= 1, found 2.0"),
        (("--ema", "1"), "--ema: expected 0 < value < 1, found 1.0"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(toy, tmp_path, capsys, flags, message):
    assert message in refused(toy, tmp_path, capsys, *flags)


def test_schedules(toy, tmp_path, capsys):
    def rates(name: str, *flags: str) -> list[float]:
        return [record["lr"] for record in train(toy, tmp_path / name, *flags)]

    half, peak = 0.5e-3, 1e-3
    assert rates("linear", "--schedule", "linear") == pytest.approx([half, peak, peak * 2 / 3, peak / 3])
    ended = rates("end", "--schedule", "linear", "--lr-end", "0.5", "--save-every", "1")
    assert ended == pytest.approx([half, peak, peak * 5 / 6, peak * 2 / 3])
    assert rates("cosine", "--schedule", "cosine") == pytest.approx([half, peak, peak * 0.75, peak * 0.25])
    assert rates("constant", "--schedule", "constant", "--warmup-steps", "None") == [peak] * 4
    longer = "--schedule", "linear", "--lr-end", "0.5", "--resume", "auto", "--epochs", "2"
    with pytest.raises(SystemExit):
        main(words(toy, tmp_path / "end", *longer))
    assert "--resume: expected the same number of steps as at" in capsys.readouterr().err


def test_the_average_is_what_is_evaluated_and_saved(toy, tmp_path, plain):
    run = tmp_path / "run"
    flags = "--ema", "0.75", "--save-every", "1", "--keep-checkpoints", "9", "--eval-data", str(toy / "held_out.jsonl")
    metrics = train(toy, run, *flags)
    assert [r["loss"] for r in metrics] == [r["loss"] for r in plain[0]]
    truth = {name: tensor.double() for name, tensor in load_file(toy / "model" / "model.safetensors").items()}
    after = [load_file(run / "checkpoints" / f"step-{k}" / "model" / "model.safetensors") for k in (1, 2, 3)]
    for raw in (*after, plain[1]):
        truth = {name: 0.75 * value + 0.25 * raw[name].double() for name, value in truth.items()}
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor.double(), truth[name], rtol=1e-6, atol=1e-6)
    scores = tmp_path / "scores.jsonl"
    scored = "score", "--model", str(run / "model"), "--reference", str(toy / "model"), "--output", str(scores)
    main([*scored, "--data", str(toy / "held_out.jsonl")])
    margins = [record["margin"] for record in read_json_lines(scores)]
    last = read_json_lines(run / "eval.jsonl")[-1]
    assert sum(margins) / len(margins) == pytest.approx(last["margin"], abs=1e-6)
    held = weights(run)
    (run / "finished.json").unlink()
    train(toy, run, *flags, "--resume", "must")
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights(run).items())


def test_the_last_step_is_normalised_by_the_pairs_that_it_holds(toy, tmp_path, plain):
    """14 pairs in steps of 4: the last has 2, and its loss and gradient norm are those of a mean over 2."""
    assert [record["pairs"] for record in plain[0]] == [4, 4, 4, 2]
    model, reference = (load_model(str(toy / "model")).double() for _ in range(2))
    for network in (model, reference):
        prepare(network, "shared")
    tokenizer = load_tokenizer(str(toy / "model"))
    data = load_preferences(str(toy / "pairs.jsonl"), tokenizer, eos_token_ids=[1])
    single = []
    for k in range(2):
        step = build_step(data, [k], StepPlan())
        single.append(forward_backward(model, step, OnlineReference(reference, Objective()), Objective()).sums.read())
    summed = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    last = build_step(data, [0, 1], StepPlan(pairs_per_step=4))
    both = forward_backward(model, last, OnlineReference(reference, Objective()), Objective()).sums.read()
    assert both["loss"] == pytest.approx(sum(s["loss"] for s in single) / 2, rel=1e-10)
    for p, total in zip((p for p in model.parameters() if p.grad is not None), summed, strict=True):
        torch.testing.assert_close(p.grad, total / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_clipping_and_accumulation_are_exact_across_bins(clip):
    """Weights after an update from many bins are those of plain torch from one bin, in float64."""
    from transformers import LlamaForCausalLM

    from tests.train.toy import toy_config

    groups, objective = random_groups(), Objective(beta=0.3)
    after = []
    for budget in (10_000, 45):
        torch.manual_seed(0)
        model = LlamaForCausalLM(toy_config()).double()
        torch.manual_seed(1)
        reference = OnlineReference(LlamaForCausalLM(toy_config()).double(), objective)
        for network in (model, reference.model):
            prepare(network, "shared")
        step = build_step(groups, range(len(groups)), StepPlan(token_budget=budget))
        result = forward_backward(model, step, reference, objective)
        params = list(model.parameters())
        if budget == 45:
            assert len(step.all_bins) > 3
            update = apply_update(build_optimizer("sgd", params, lr=0.5), result.sums.loss, clip)
            assert (update.grad_norm.item() > clip) == (clip < 1)
        else:
            torch.nn.utils.clip_grad_norm_(params, clip)
            torch.optim.SGD(params, lr=0.5).step()
        after.append(torch.cat([p.detach().flatten() for p in params]))
    torch.manual_seed(0)
    start = torch.cat([p.detach().double().flatten() for p in LlamaForCausalLM(toy_config()).parameters()])
    assert (after[1] - after[0]).norm() <= 1e-6 * (after[0] - start).norm()


def test_metrics_say_no_more_than_json_can(toy, plain):
    assert "loss_scale" not in plain[0][0]
    json.dumps(plain[0], allow_nan=False)
