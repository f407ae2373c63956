"""`dpo train` on several processes: the run of one process, its files, errors, signals, checkpoints."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo.refsetup
from dpo.cli import main
from dpo.metrics import read_json_lines
from tests.ranks import spawn
from tests.train.toy import write_toy

TOY = ("--pairs-per-step", "6", "--lr", "1e-3", "--warmup-steps", "2", "--max-steps", "4", "--token-budget", "100")

KEYS = {
    "step",
    "loss",
    "accuracy",
    "margin",
    "pairs",
    "chosen_logps_per_token",
    "length_correlation",
    "grad_norm",
    "lr",
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), held_out=7)


def words(toy: Path, output: Path, *flags: str) -> list[str]:
    held_out = ("--eval-data", str(toy / "held_out.jsonl"), "--eval-every", "2", "--save-every", "2")
    model = ("--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output))
    return ["train", *model, "--reference-cache", str(output.parent / "references"), *held_out, *TOY, *flags]


def on(ranks: int, toy: Path, output: Path, *flags: str):
    results = spawn.run(ranks, "-m", "dpo.cli", *words(toy, output, *flags))
    assert [status for status, _, _ in results] == [0] * ranks, results
    return results


def weights(folder: Path) -> torch.Tensor:
    (file,) = (folder / "model").glob("*model.safetensors")
    return torch.cat([t.flatten() for _, t in sorted(load_file(file).items())])


@pytest.fixture(scope="module")
def one(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    main(words(toy, run))
    return run


@pytest.fixture(scope="module")
def two(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("two") / "run"
    return run, on(2, toy, run, "--parallel", "fsdp")


def _same_run(ours: Path, theirs: Path) -> None:
    for name in ("metrics.jsonl", "eval.jsonl"):
        for mine, other in zip(read_json_lines(ours / name), read_json_lines(theirs / name), strict=True):
            assert mine.keys() == other.keys()
            for key in KEYS & mine.keys():
                assert mine[key] == pytest.approx(other[key], rel=2e-4, abs=2e-5), (name, mine["step"], key)
    assert (weights(ours) - weights(theirs)).norm() <= 1e-4 * weights(theirs).norm()


def test_two_ranks_make_the_run_of_one_process(one, two, toy):
    run, _ = two
    _same_run(run, one)
    first = read_json_lines(run / "metrics.jsonl")[0]
    assert (first["margin"], first["accuracy"]) == (0.0, 0.5)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((run / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<eos>"


def test_only_rank_0_prints_and_each_writes_its_part(two):
    run, ((_, out, _), (_, other, _)) = two
    assert "2 ranks, fsdp" in out
    assert other == ""
    parts = sorted(path.name for path in (run / "checkpoints" / "step-2" / "sharded").iterdir())
    assert len(parts) == 2
    assert all(name.endswith(".safetensors") for name in parts)
    held = [set(load_file(run / "checkpoints" / "step-2" / "sharded" / name)) for name in parts]
    assert held[0] & held[1]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 2), (1, 2)])
@pytest.mark.slow
def test_a_run_resumes_on_another_number_of_ranks(one, two, toy, tmp_path, before, after):
    run = tmp_path / "run"
    spawn.copy_run({1: one, 2: two[0]}[before], run)
    if after == 1:
        main(words(toy, run, "--resume", "auto"))
    else:
        on(after, toy, run, "--resume", "auto", "--parallel", "fsdp")
    assert [record["step"] for record in read_json_lines(run / "metrics.jsonl")] == [0, 1, 2, 3]
    _same_run(run, one)
    if before == after:
        assert torch.equal(weights(run), weights(two[0]))


ADAPTER = ("--lora-r", "4", "--lr", "1e-2", "--ema", "0.5", "--best-metric", "loss", "--optimizer", "adamw")
SAMPLES = ("--sample-prompts", "3", "--sample-tokens", "4", "--sample-temperature", "0.7")
MOVING = ("--reference", "online", "--ref-update-every", "1", "--ref-mix", "0.5", "--optimizer", "adamw")
BF16 = ("--dtype", "bf16", "--param-dtype", "bf16")
MANY: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (2, ("--parallel", "ddp", "--optimizer", "adamw", *SAMPLES)),
    "online": (2, ("--parallel", "fsdp", "--reference", "online", "--gradient-checkpointing", *SAMPLES)),
    "moving": (2, ("--parallel", "fsdp", *MOVING)),
    "adapter": (2, ("--parallel", "fsdp", *ADAPTER, *SAMPLES)),
    "bf16": (2, ("--parallel", "fsdp", "--dtype", "bf16")),
    "fp16": (2, ("--parallel", "fsdp", "--dtype", "fp16")),
    "bf16 weights": (2, ("--parallel", "fsdp", *BF16)),
    "bf16 weights, random": (2, ("--parallel", "fsdp", *BF16, "--bf16-update", "random")),
    "bf16 weights, adapter": (2, ("--parallel", "ddp", *BF16, "--lora-r", "4")),
    "two-phase": (3, ("--parallel", "fsdp", "--two-phase", "--token-budget", "60", "--data-workers", "1")),
    "padded": (3, ("--parallel", "fsdp", "--padded", "--best-metric", "loss")),
}
"""Runs by name: ranks and flags."""


def alone(flags: tuple[str, ...]) -> list[str]:
    return [flag for flag in flags if flag not in ("--parallel", "ddp", "fsdp")]


@pytest.fixture(scope="module")
def many(toy, tmp_path_factory):
    """The runs of MANY, and `dpo cache` before them."""
    folder = tmp_path_factory.mktemp("many")
    cache = ["cache", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--pairs-per-step", "6"]
    cache += ["--reference-cache", str(folder / "cached")]
    for ranks in (2, 3):
        runs = [words(toy, folder / name / "run", *flags) for name, (number, flags) in MANY.items() if number == ranks]
        spawn.run_each(ranks, [cache, *runs] if ranks == 2 else runs)
    return folder


@pytest.mark.parametrize("name", MANY)
@pytest.mark.slow
def test_the_run_does_not_depend_on_the_ranks(toy, many, tmp_path, name):
    flags = MANY[name][1]
    main(words(toy, tmp_path / "run", *alone(flags)))
    if not {"bf16", "fp16"} & set(flags):
        _same_run(many / name / "run", tmp_path / "run")
    if "--sample-prompts" in flags:
        _same_samples(many / name / "run", tmp_path / "run")
    ours, theirs = (read_json_lines(run / "metrics.jsonl") for run in (many / name / "run", tmp_path / "run"))
    assert ours[0]["margin"] == theirs[0]["margin"] == 0.0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=3e-3)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


def _same_samples(ours: Path, theirs: Path) -> None:
    mine, other = (read_json_lines(run / "samples.jsonl") for run in (ours, theirs))
    texts = [{k: v for k, v in r.items() if k != "log_ratio"} for r in mine]
    assert texts == [{k: v for k, v in r.items() if k != "log_ratio"} for r in other]
    for a, b in zip(mine, other, strict=True):
        assert a["log_ratio"] == pytest.approx(b["log_ratio"], abs=1e-4)
    for a, b in zip(*(read_json_lines(run / "eval.jsonl") for run in (ours, theirs)), strict=True):
        assert a["kl"] == pytest.approx(b["kl"], abs=1e-4)


@pytest.mark.slow
def test_what_two_ranks_cached_is_all_that_one_process_needs(toy, many, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo.refsetup.ReferenceSource, "model", lambda self: pytest.fail("reference computed"))
    flags = ("--reference-cache", str(many / "cached"))
    train = [word for word in words(toy, tmp_path / "run", *flags) if word != str(toy / "held_out.jsonl")]
    train.remove("--eval-data")
    main(train)
    assert read_json_lines(tmp_path / "run" / "metrics.jsonl")[0]["margin"] == 0.0


@pytest.mark.parametrize("name", ["adapter", "moving"])
@pytest.mark.slow
def test_a_run_with_more_than_weights_resumes_on_one_process_and_back(toy, many, tmp_path, name):
    """The adapter with its averaged weights and the best checkpoint; the reference that follows the policy."""
    flags = MANY[name][1]
    whole = tmp_path / "whole" / "run"
    main(words(toy, whole, *alone(flags)))
    for before, folder in ((many / name / "run", "onto one"), (whole, "onto two")):
        spawn.copy_run(before, tmp_path / folder)
    checkpoint = tmp_path / "onto one" / "checkpoints" / "step-2"
    assert list((checkpoint / "sharded").glob("*.safetensors"))
    assert (checkpoint / "model" / "adapter_model.safetensors").exists() == (name == "adapter")
    main(words(toy, tmp_path / "onto one", *alone(flags), "--resume", "must"))
    on(2, toy, tmp_path / "onto two", *flags, "--resume", "must")
    for folder in ("onto one", "onto two"):
        _same_run(tmp_path / folder, whole)


@pytest.mark.slow
def test_an_sft_adapter_and_its_frozen_copy_are_sharded(toy, tmp_path):
    """The first margin is 0, as on one process: the reference is the copy, not the base. A copy of the head trains
    beside the adapter."""
    settings = {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    (tmp_path / "lora.json").write_text(json.dumps(settings))
    main(words(toy, tmp_path / "sft" / "run", "--lora-config", str(tmp_path / "lora.json"), "--lr", "1e-2"))
    adapter = ("--adapter", str(tmp_path / "sft" / "run" / "model"), "--reference", "adapter-off", "--dtype", "bf16")
    main(words(toy, tmp_path / "one" / "run", *adapter))
    on(2, toy, tmp_path / "two" / "run", *adapter, "--parallel", "fsdp")
    ours, theirs = (read_json_lines(tmp_path / name / "run" / "metrics.jsonl") for name in ("two", "one"))
    assert ours[0]["margin"] == theirs[0]["margin"] == 0.0
    assert abs(theirs[-1]["margin"]) > 1e-3
    held, other = (load_file(tmp_path / n / "run" / "model" / "adapter_model.safetensors") for n in ("two", "one"))
    assert any("lm_head" in name for name in held)
    for name, tensor in other.items():
        assert (held.pop(name) - tensor).abs().max() < 0.02
    assert not held
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=3e-3)


def test_an_error_ends_all_ranks_with_one_line_and_status_2(toy, tmp_path):
    """Rank 1 alone has a folder without a model: the other waits for it in a collective."""
    flags = words(toy, tmp_path / "run")
    script = "import os, sys; from dpo.cli import main; r = os.environ['RANK'];"
    script += "main([w.replace('model', 'nowhere') if r == '1' and w.endswith('/model') else w for w in sys.argv[1:]])"
    results = spawn.run(2, "-c", script, *flags)
    assert [status for status, _, _ in results] == [2, 2]
    errors = [line for _, _, err in results for line in err.splitlines() if line.startswith("dpo:")]
    assert len(errors) == 1
    assert "--model" in errors[0]
    assert not any("Traceback" in err for _, _, err in results)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lr", "-1"), "--lr: expected a positive number"),
        (("--parallel", "fsdp", "--optimizer", "adafactor"), "--optimizer adafactor: expected --parallel ddp"),
        (("--parallel", "ddp", "--dtype", "bf16", "--param-dtype", "bf16"), "--param-dtype bf16: expected"),
        (("--no-such-flag",), "no-such-flag"),
    ],
    ids=str,
)
@pytest.mark.slow
def test_bad_flags_are_told_once(toy, tmp_path, flags, message):
    results = spawn.run(2, "-m", "dpo.cli", *words(toy, tmp_path / "run", *flags))
    assert [status for status, _, _ in results] == [2, 2]
    told = [err for _, _, err in results if message in err]
    assert len(told) == 1
    assert not any("Traceback" in err for _, _, err in results)


def test_parallel_without_torchrun_is_refused(toy, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words(toy, tmp_path / "run", "--parallel", "fsdp"))
    assert stop.value.code == 2
    assert "--parallel fsdp: expected a run started by torchrun" in capsys.readouterr().err


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_a_checkpoint_and_stops_all(toy, tmp_path):
    run = tmp_path / "run"
    flags = words(toy, run, "--parallel", "fsdp", "--max-steps", "100000", "--epochs", "100000", "--save-every", "0")
    processes = spawn.start(2, ["-m", "dpo.cli", *flags])
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len(read_json_lines(run / "metrics.jsonl")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGTERM)
    results = spawn.finish(processes, timeout=120)
    assert [status for status, _, _ in results] == [128 + signal.SIGTERM] * 2, results
    assert sum("stopped by SIGTERM" in err for _, _, err in results) == 1
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    done = int(re.fullmatch(r"step-(\d+)", checkpoint.name)[1])  # pyright: ignore[reportOptionalSubscript]
    assert len(read_json_lines(run / "metrics.jsonl")) == done
