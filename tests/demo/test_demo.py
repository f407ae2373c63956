"""`dpo demo`: its parts by themselves, then all of it."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo.cli
import dpo.demo.run as demo_run
from dpo.commands import DemoConfig
from dpo.data import PreferenceData, load_preferences
from dpo.demo.model import END, build_model, train_tokenizer, warm_up
from dpo.demo.samples import WordJudge
from dpo.metrics import read_json_lines
from dpo.model import shared_logps
from dpo.packing import pack


def test_judge_by_hand():
    judge = WordJudge(["good good film", "good food"], ["bad film"])
    # good: (2 + 1) / 4 against (0 + 1) / 3; film: 2 / 4 against 2 / 3; bad: 1 / 4 against 2 / 3
    assert judge._log_odds["good"] == pytest.approx(math.log(9 / 4))
    assert judge._log_odds["film"] == pytest.approx(math.log(3 / 4))
    assert judge._log_odds["bad"] == pytest.approx(math.log(3 / 8))
    assert judge.is_positive("A GOOD film.")
    assert not judge.is_positive("bad, but good")
    assert not judge.is_positive("nothing known")
    assert judge.share_positive(["good", "good!", "bad", "film"]) == 0.5


def test_judge_is_right_about_most_held_out_sentences():
    pairs = demo_run.load_pairs()
    judge = WordJudge([row["chosen"] for row in pairs["train"]], [row["rejected"] for row in pairs["train"]])
    held_out = pairs["held-out"]
    right = sum(judge.is_positive(row["chosen"]) + (not judge.is_positive(row["rejected"])) for row in held_out)
    assert right / (2 * len(held_out)) > 0.8


def tokenised(rows: list[dict[str, str]]) -> tuple[Any, PreferenceData]:
    tokenizer: Any = train_tokenizer(row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected"))
    return tokenizer, load_preferences(rows, tokenizer, eos_token_ids=[tokenizer.eos_token_id])


def test_tokenizer_gives_back_its_texts_and_ends_them_once():
    rows = demo_run.load_pairs()["train"]
    tokenizer, data = tokenised(rows)
    assert len(tokenizer) == 2048
    assert len(data) == len(rows)
    for row, group in list(zip(rows, data, strict=True))[::50]:
        decoded = tokenizer.decode(group.prompt) + tokenizer.decode(group.completions[0])
        assert decoded == row["prompt"] + row["chosen"] + END
        assert group.completions[0].count(tokenizer.eos_token_id) == 1


def test_warm_up_learns_and_repeats():
    tokenizer, data = tokenised(demo_run.load_pairs()["train"][:48])
    groups = list(data)
    models = [build_model(tokenizer, seed=3) for _ in range(2)]
    first, second = (warm_up(model, groups, epochs=8, seed=3) for model in models)
    assert first == second
    with torch.no_grad():
        loss = -shared_logps(models[0], pack(groups)).token_logps.mean().item()
    assert loss == pytest.approx(first, abs=0.2)
    assert loss < math.log(len(tokenizer)) - 1


@pytest.mark.parametrize("seed", [0, 7])
def test_printed_commands_are_what_runs(seed, monkeypatch):
    config = DemoConfig(output="a folder/demo", seed=seed, epochs=3)
    parsed = []
    monkeypatch.setattr(dpo.cli, "run", parsed.append)
    for name, made in (("train", demo_run.train_config(config)), ("score", demo_run.score_config(config))):
        words = shlex.split(demo_run.command(name, made))
        assert words[:2] == ["dpo", name]
        dpo.cli.main(words[1:])
        assert parsed.pop() == made


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.fixture
def small(monkeypatch):
    """The demo on few pairs and few samples."""
    pairs = demo_run.load_pairs()
    few = {"train": pairs["train"][::40], "held-out": pairs["held-out"][::24]}
    monkeypatch.setattr(demo_run, "load_pairs", lambda: {split: list(rows) for split, rows in few.items()})
    monkeypatch.setattr(demo_run, "SAMPLES", 4)
    return few


def test_small_demo_leaves_everything_in_its_folder(small, tmp_path, capsys):
    folder = tmp_path / "demo"
    dpo.cli.main(["demo", "--output", str(folder), "--epochs", "1"])
    result = json.loads((folder / "demo.json").read_text())
    assert result["pairs"] == {"train": 30, "held-out": 12}
    assert result["held_out_accuracy"]["before"] == 0.5
    scores = read_json_lines(folder / "scores.jsonl")
    right = [(row["margin"] > 0) + 0.5 * (row["margin"] == 0) for row in scores]
    assert sum(right) / len(right) == pytest.approx(result["held_out_accuracy"]["after"])
    samples = read_json_lines(folder / "samples.jsonl")
    assert len(samples) == result["samples"] == 12
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    base, trained = (load(folder / name) for name in ("base", "run/model"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "run/model")
    assert base.config.use_cache
    assert len(tokenizer) == base.get_input_embeddings().weight.shape[0]
    assert any(not torch.equal(a, b) for a, b in zip(base.parameters(), trained.parameters(), strict=True))
    printed = capsys.readouterr().out
    assert f"dpo train --model {folder}/base" in printed
    assert f"{folder}/demo.png" in printed

    (folder / "left over").touch()
    dpo.cli.main(["demo", "--output", str(folder), "--epochs", "1"])
    assert not (folder / "left over").exists()
    again = json.loads((folder / "demo.json").read_text())
    for name in ("held_out_accuracy", "positive_samples"):
        assert again[name] == result[name]


def test_demo_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    for folder in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(SystemExit) as stop:
            dpo.cli.main(["demo", "--output", str(folder)])
        assert stop.value.code == 2
        assert f"--output {folder}: expected a new folder" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.slow
def test_demo_from_the_command_line(tmp_path):
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "dpo.cli", "demo", "--output", str(folder)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((folder / "demo.json").read_text())
    assert result["held_out_accuracy"]["before"] == 0.5
    assert result["held_out_accuracy"]["after"] > 0.70
    assert result["positive_samples"]["after"] > result["positive_samples"]["before"] + 0.1
