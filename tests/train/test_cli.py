"""`dpo train` and `dpo score` from the command line to the files they write."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.cli import main
from dpo.commands import CacheConfig, ScoreConfig
from dpo.config import TrainConfig
from dpo.flags import by_topic
from dpo.metrics import read_json_lines
from tests.train.toy import write_model, write_toy

METRICS = {
    *("step", "loss", "accuracy", "margin", "chosen_reward", "rejected_reward", "grad_norm", "lr"),
    *("step_seconds", "pairs_per_second", "tokens_per_second", "peak_memory_bytes"),
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), held_out=7)


def train(toy: Path, output: Path, *flags: str) -> list[dict]:
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    main([*words, "--pairs-per-step", "6", "--lr", "1e-3", "--warmup-steps", "2", "--max-steps", "4", *flags])
    return read_json_lines(output / "metrics.jsonl")


def fails(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert "Traceback" not in out.err
    return out.err


@pytest.fixture(scope="module")
def plain(toy, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "plain"
    return run, train(toy, run, "--eval-data", str(toy / "held_out.jsonl"), "--eval-every", "2", "--save-every", "2")


def test_a_run_folder_holds_what_it_should(plain, toy):
    run, metrics = plain
    assert [record["step"] for record in metrics] == [0, 1, 2, 3]
    assert all(record.keys() >= METRICS for record in metrics)
    assert all(record["pairs"] == 6 for record in metrics)
    assert [record["lr"] for record in metrics] == pytest.approx([1e-3 / 3, 2e-3 / 3, 1e-3, 1e-3])
    assert [record["step"] for record in read_json_lines(run / "eval.jsonl")] == [0, 2, 4]
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["beta"] == 0.1
    assert config["max_steps"] == 4
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.config.use_cache
    assert model.config._attn_implementation == "sdpa"
    assert AutoTokenizer.from_pretrained(run / "model").eos_token == "<eos>"
    before = load_file(toy / "model" / "model.safetensors")
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if name in before)


@pytest.mark.parametrize("flags", [(), ("--reference", "online"), ("--dtype", "bf16"), ("--two-phase",)], ids=str)
def test_margins_of_step_0_are_exactly_zero_and_the_loss_ln_2(toy, tmp_path, flags):
    first = train(toy, tmp_path / "run", "--token-budget", "80", *flags)[0]
    assert first["bins"] > 1
    assert first["margin"] == 0.0
    assert first["chosen_reward"] == 0.0
    assert first["accuracy"] == 0.5
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize(
    "flags",
    [
        ("--token-budget", "60"),
        ("--no-share-prefix",),
        ("--padded",),
        ("--two-phase",),
        ("--reference", "online"),
        ("--gradient-checkpointing",),
        ("--data-workers", "1"),
        ("--head-plan", "recompute"),
        ("--head-workspace-mb", "1"),
        ("--kernel-backend", "torch"),
    ],
    ids=" ".join,
)
def test_the_trajectory_does_not_depend_on_how_it_is_computed(toy, tmp_path, plain, flags):
    metrics = train(toy, tmp_path / "run", *flags)
    for ours, theirs in zip(metrics, plain[1], strict=True):
        for name in ("loss", "margin", "grad_norm", "chosen_logps_per_token"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-4, abs=2e-5), (ours["step"], name)


@pytest.mark.parametrize(
    "flags",
    [
        ("--beta", "0.5"),
        ("--label-smoothing", "0.2"),
        ("--optimizer", "adamw"),
        ("--seed", "1"),
        ("--weight-decay", "0.5"),
        ("--grad-clip", "0.01"),
        ("--dtype", "bf16"),
        ("--max-completion-length", "4"),
        ("--max-prompt-length", "3"),
        ("--warmup-steps", "0"),
    ],
    ids=" ".join,
)
def test_an_option_changes_what_it_says_it_changes(toy, tmp_path, plain, flags):
    metrics = train(toy, tmp_path / "run", *flags)
    assert abs(metrics[-1]["loss"] - plain[1][-1]["loss"]) > 1e-6


def test_a_resumed_run_ends_with_the_same_weights(toy, tmp_path, plain):
    run = tmp_path / "resumed"
    shutil.copytree(plain[0], run)
    shutil.rmtree(run / "model")
    flags = "--eval-data", str(toy / "held_out.jsonl"), "--eval-every", "2", "--save-every", "2"
    metrics = train(toy, run, *flags, "--resume", "auto")
    assert [r["step"] for r in metrics] == [0, 1, 2, 3]
    assert [r["loss"] for r in metrics] == [r["loss"] for r in plain[1]]
    assert [r["step"] for r in read_json_lines(run / "eval.jsonl")] == [0, 2, 4]
    ours, theirs = (load_file(folder / "model" / "model.safetensors") for folder in (run, plain[0]))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_resume_refuses_another_objective(toy, tmp_path, plain, capsys):
    run = tmp_path / "resumed"
    shutil.copytree(plain[0], run)
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(run)]
    same = "--pairs-per-step", "6", "--lr", "1e-3", "--warmup-steps", "2"
    error = fails(capsys, *words, *same, "--resume", "auto", "--beta", "0.3")
    assert "--beta: expected 0.1 as in the run to resume, found 0.3" in error


def test_an_untrained_reference_model_is_the_default_and_another_one_counts(toy, tmp_path, plain):
    same = train(toy, tmp_path / "same", "--reference-model", str(toy / "model"))
    assert [r["loss"] for r in same] == [r["loss"] for r in plain[1]]
    write_model(tmp_path / "other", seed=5)
    other = train(toy, tmp_path / "run", "--reference-model", str(tmp_path / "other"))
    assert other[0]["margin"] != 0.0


def test_flags_win_over_the_config_file(toy, tmp_path):
    (tmp_path / "run.yaml").write_text("beta: 0.7\nlr: 1e-4\nshare_prefix: false\nmax_prompt_length: null\n")
    train(toy, tmp_path / "run", "--config", str(tmp_path / "run.yaml"), "--beta", "0.2")
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (config["beta"], config["share_prefix"], config["max_prompt_length"]) == (0.2, False, None)
    again = tmp_path / "again.yaml"
    again.write_text((tmp_path / "run" / "config.yaml").read_text())
    main(["train", "--config", str(again), "--output", str(tmp_path / "again")])
    first, second = (read_json_lines(tmp_path / name / "metrics.jsonl") for name in ("run", "again"))
    assert [r["loss"] for r in first] == [r["loss"] for r in second]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model", "./nowhere"), "--model ./nowhere: expected"),
        (("--config", "nowhere.yaml"), "--config nowhere.yaml: expected"),
        (("--lr", "-1"), "--lr: expected a positive number, found -1.0"),
        (("--label-smoothing", "0.7"), "--label-smoothing: expected 0 <= value < 0.5, found 0.7"),
        (("--eval-data", "x.jsonl", "--eval-fraction", "0.1"), "--eval-fraction: expected no --eval-data"),
        (("--token-budget", "5"), "--token-budget 5"),
        (("--device", "toaster"), "--device: expected"),
        (("--resume", "auto", "--overwrite"), "--resume"),
        (("--kernel-backend", "triton"), "--kernel-backend triton: "),
        (("--head-plan", "frozen"), "--head-plan frozen: expected"),
        (("--no-such-flag",), "no-such-flag"),
        (("--lr", "fast"), "--lr"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_and_status_2(toy, tmp_path, capsys, flags, message):
    words = [
        "train",
        "--model",
        str(toy / "model"),
        "--data",
        str(toy / "pairs.jsonl"),
        "--output",
        str(tmp_path / "run"),
    ]
    error = fails(capsys, *words, *flags)
    assert message in error
    assert not (tmp_path / "run").exists()
    if error.startswith("dpo:"):
        assert error.count("\n") == 1


def test_an_unknown_setting_in_the_config_file_is_named(toy, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("betta: 0.7\n")
    assert "unknown setting 'betta'" in fails(capsys, "train", "--config", str(tmp_path / "run.yaml"))


def test_nothing_is_written_over(toy, plain, tmp_path, capsys):
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output"]
    assert "found a run" in fails(capsys, *words, str(plain[0]))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("keep me")
    assert "other files" in fails(capsys, *words, str(tmp_path / "letters"), "--overwrite")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "keep me"


def _poisoned(toy: Path, folder: Path, token: str) -> Path:
    """The toy model with an embedding of one byte that is not a number."""
    shutil.copytree(toy / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(token)] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_updates_that_are_not_finite_are_skipped_reported_and_stop_the_run(toy, tmp_path, capsys):
    bad = _poisoned(toy, tmp_path / "bad", "Z")
    rows = [json.loads(line) for line in (toy / "pairs.jsonl").read_text().splitlines()]
    rows[3]["prompt"] += "Z"
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = "--model", str(bad), "--no-check-sharing", "--overwrite"
    metrics = train(toy, tmp_path / "run", *words, "--data", str(tmp_path / "one.jsonl"))
    assert sum(record["skipped"] for record in metrics) == 1
    assert "rows with log-probs that are not finite: 4)" in capsys.readouterr().out
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert sum(int((~torch.isfinite(tensor)).sum()) for tensor in weights.values()) == 32

    for row in rows:
        row["prompt"] += "Z"
    (tmp_path / "all.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit) as stop:
        train(toy, tmp_path / "run", *words, "--data", str(tmp_path / "all.jsonl"), "--max-skipped", "2")
    assert stop.value.code == 2
    assert "2 updates in a row were not finite" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/model/model.safetensors"))


def test_scores_are_those_of_plain_forwards_in_input_order(toy, plain, tmp_path):
    output = tmp_path / "scores.jsonl"
    words = ["score", "--model", str(plain[0] / "model"), "--reference", str(toy / "model")]
    main([*words, "--data", str(toy / "held_out.jsonl"), "--output", str(output), "--token-budget", "70"])
    records = read_json_lines(output)
    rows = [json.loads(line) for line in (toy / "held_out.jsonl").read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    policy, reference = (AutoModelForCausalLM.from_pretrained(p).double() for p in (plain[0] / "model", toy / "model"))
    for record, row in zip(records, rows, strict=True):
        sums = {}
        for name, model in (("", policy), ("ref_", reference)):
            for side in ("chosen", "rejected"):
                prompt = tokenizer(row["prompt"]).input_ids
                completion = [*tokenizer(row[side], add_special_tokens=False).input_ids, tokenizer.eos_token_id]
                with torch.no_grad():
                    logits = model(torch.tensor([prompt + completion])).logits[0].double()
                logps = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
                sums[f"{name}{side}_logps"] = logps.sum().item()
        for name, value in sums.items():
            assert record[name] == pytest.approx(value, rel=1e-5), name
        chosen = 0.1 * (sums["chosen_logps"] - sums["ref_chosen_logps"])
        rejected = 0.1 * (sums["rejected_logps"] - sums["ref_rejected_logps"])
        assert record["chosen_reward"] == pytest.approx(chosen, abs=1e-4)
        assert record["margin"] == pytest.approx(chosen - rejected, abs=1e-4)


def test_score_and_evaluation_agree(toy, plain, tmp_path):
    output = tmp_path / "scores.jsonl"
    words = ["score", "--model", str(plain[0] / "model"), "--reference", str(toy / "model")]
    main([*words, "--data", str(toy / "held_out.jsonl"), "--output", str(output)])
    records, last = read_json_lines(output), read_json_lines(plain[0] / "eval.jsonl")[-1]
    for name in ("margin", "chosen_reward", "rejected_reward"):
        assert sum(r[name] for r in records) / len(records) == pytest.approx(last[name], abs=1e-5)
    margins = torch.tensor([r["margin"] for r in records])
    assert (margins > 0).float().mean().item() == pytest.approx(last["accuracy"])
    assert -torch.nn.functional.logsigmoid(margins).mean().item() == pytest.approx(last["loss"], abs=1e-5)


def test_score_does_not_write_over_a_file(toy, tmp_path, capsys):
    (tmp_path / "kept").write_text("mine")
    words = ["score", "--model", str(toy / "model"), "--reference", str(toy / "model")]
    error = fails(capsys, *words, "--data", str(toy / "held_out.jsonl"), "--output", str(tmp_path / "kept"))
    assert "--overwrite" in error
    assert (tmp_path / "kept").read_text() == "mine"


@pytest.mark.parametrize("command", [TrainConfig, CacheConfig, ScoreConfig])
def test_every_flag_has_one_topic(command):
    topics = get_type_hints(by_topic(command))
    nested = [field.name for topic in topics.values() for field in dataclasses.fields(topic)]
    assert sorted(nested) == sorted(field.name for field in dataclasses.fields(command))


def test_help_has_a_box_a_topic(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    topic, box = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if title := re.match(r"\W+(\w+) options\W+$", line):
            box = title[1]
        elif flag := re.match(r"\W (--[\w-]+)", line):
            topic[flag[1]] = box
    expected = {"--model": "main", "--beta": "loss", "--lr": "optimizer", "--lora-r": "lora", "--dtype": "forward"}
    assert expected.items() <= topic.items()


@pytest.mark.parametrize("words", [["train", "--help"], ["losses"]], ids=str)
def test_a_reader_that_has_seen_enough_gets_no_traceback(words):
    command = [sys.executable, "-m", "dpo.cli", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_help_and_version(capsys):
    for words in (["--help"], ["train", "--help"], ["score", "--help"], ["demo", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    assert "--pairs-per-step" in capsys.readouterr().out
    main(["--version"])
    assert capsys.readouterr().out.startswith("fused-dpo ")
