"""From the command line to the first step: what a flag changes in its batches, its model and its reference.

Runs that differ only in how they compute have the same losses: here is shown that they do compute differently.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import dpo.attention
import dpo.cli
import dpo.train
from dpo.attention import ATTENTION
from dpo.cli import main
from dpo.metrics import read_json_lines
from dpo.reference import CachedReference, OnlineReference
from dpo.steps import StepBatch
from tests.train.test_cli import fails
from tests.train.toy import write_toy


class Reached(Exception):
    """The first step, and the arguments that it got."""

    def __init__(self, model: Any, step: StepBatch, reference: Any) -> None:
        super().__init__("a first step")
        self.model, self.step, self.reference = model, step, reference
        self.attention = model.config._attn_implementation
        self.checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())

    @property
    def rows(self) -> set[int | str]:
        return {row for b in self.step.all_bins for row in b.batch.rows}

    @property
    def layouts(self) -> set[str]:
        return {b.batch.layout for b in self.step.all_bins}


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = write_toy(tmp_path_factory.mktemp("toy"), held_out=5)
    uneven = [{"prompt": "a", "completions": ["b", "c", "d"], "scores": [3, 2, 1]}]
    uneven += [{"prompt": "e", "completions": ["f", "g"], "scores": [1, 0]}]
    (folder / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in uneven))
    return folder


def words(toy: Path, output: Path, *flags: str) -> list[str]:
    start = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    return [*start, "--pairs-per-step", "6", "--max-steps", "2", "--warmup-steps", "0", *flags]


@pytest.fixture
def reach(toy, tmp_path, monkeypatch):
    """Runs `dpo train` up to its first step."""

    def stop(model: Any, step: StepBatch, reference: Any, *_: Any) -> None:
        raise Reached(model, step, reference)

    def run(*flags: str) -> Reached:
        monkeypatch.setattr(dpo.train, "forward_backward", stop)
        with pytest.raises(Reached) as found:
            main(words(toy, tmp_path / "run", "--overwrite", *flags))
        return found.value

    return run


FLAGS: dict[tuple[str, ...], Callable[[Reached], bool]] = {
    (): lambda r: r.layouts == {"shared"} and r.attention == ATTENTION and r.step.coupled is None,
    ("--no-share-prefix",): lambda r: r.layouts == {"packed"} and r.attention == ATTENTION,
    ("--padded",): lambda r: r.layouts == {"padded"} and r.attention == "sdpa",
    ("--two-phase",): lambda r: r.step.bins == () and r.step.coupled is not None,
    ("--token-budget", "60"): lambda r: max(b.batch.num_tokens for b in r.step.all_bins) <= 60,
    ("--gradient-checkpointing",): lambda r: r.checkpointing,
    ("--groups-per-step", "5"): lambda r: r.step.num_groups == 5,
    ("--reference", "cached"): lambda r: type(r.reference) is CachedReference,
    ("--reference", "online"): lambda r: type(r.reference) is OnlineReference and r.reference.model is not r.model,
    ("--data-split", "train[3:8]"): lambda r: r.rows == {4, 5, 6, 7, 8},
    ("--eval-fraction", "0.8", "--epochs", "1"): lambda r: len(r.rows) == 5,
}


@pytest.mark.parametrize("flags", FLAGS, ids=" ".join)
def test_a_flag_reaches_the_first_step(reach, flags):
    found = reach(*flags)
    assert FLAGS[flags](found)
    others = [check for other, check in FLAGS.items() if other not in (flags, (), ("--reference", "cached"))]
    assert flags or not any(check(found) for check in others), "a check that the defaults pass checks nothing"


def test_prompts_weigh_alike_where_that_is_asked_for(reach, toy):
    data = "--data", str(toy / "scored.jsonl")
    (b,) = reach(*data).step.bins
    assert b.batch.pair_weights.tolist() == pytest.approx([1 / 4] * 4)
    (b,) = reach(*data, "--reduction", "prompts").step.bins
    assert sorted(b.batch.pair_weights.tolist()) == pytest.approx([1 / 6, 1 / 6, 1 / 6, 1 / 2])


def test_data_workers_draw_and_pack(reach, monkeypatch):
    asked = []
    loader = dpo.train.DataLoader
    monkeypatch.setattr(
        dpo.train, "DataLoader", lambda *a, num_workers, **k: asked.append(num_workers) or loader(*a, **k)
    )
    reach()
    reach("--data-workers", "2")
    assert asked == [0, 2]


def test_held_out_rows_are_those_of_their_own_split(reach, toy, tmp_path):
    reach("--eval-data", str(toy / "held_out.jsonl"), "--eval-split", "train[2:4]")
    assert [record["pairs"] for record in read_json_lines(tmp_path / "run" / "eval.jsonl")] == [2]
    assert [record["row"] for record in read_json_lines(tmp_path / "run" / "eval_pairs.jsonl")] == [3, 4]


def test_the_first_bin_is_checked_before_training_unless_that_is_turned_off(reach, toy, tmp_path, capsys, monkeypatch):
    reach()
    assert "check: packed and plain forwards agree" in capsys.readouterr().out

    def blind(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.zeros_like(query).transpose(1, 2)

    monkeypatch.setattr(dpo.attention, "flash_segments", blind)
    assert "differs from plain forwards of the same model" in fails(capsys, *words(toy, tmp_path / "wrong"))
    assert not (tmp_path / "wrong").exists()
    reach("--no-check-sharing")
    assert "check: packed" not in capsys.readouterr().out


def test_flags_of_every_kind_win_over_the_config_file(tmp_path, monkeypatch):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: m\ndata: d\nlr: 1e-4\nshare_prefix: false\npadded: true\nlog_to: [tensorboard, wandb]\nmax_steps: 5\n"
        "optimizer_options: {eps: 1.0e-6}\nwarmup-steps: 3\n"
    )
    seen: list[Any] = []
    monkeypatch.setattr(dpo.cli, "run", seen.append)

    def settings(*flags: str) -> dict[str, Any]:
        main(["train", "--config", str(file), *flags])
        names = ("lr", "share_prefix", "padded", "log_to", "max_steps", "optimizer_options", "warmup_steps")
        return {name: getattr(seen[-1], name) for name in names}

    assert list(settings().values()) == [1e-4, False, True, ("tensorboard", "wandb"), 5, "{eps: 1.0e-06}", 3]
    flags = "--lr 1 --share-prefix --no-padded --log-to none --max-steps None --optimizer-options {} --warmup_steps 0"
    assert list(settings(*flags.split()).values()) == [1.0, True, False, ("none",), None, "{}", 0]


def test_every_end_of_sequence_of_a_list_ends_a_completion(toy, tmp_path):
    """A model of which the generation config names two: no second one is added behind either."""
    shutil.copytree(toy / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    GenerationConfig(eos_token_id=[1, tokenizer.convert_tokens_to_ids("#")]).save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": "a", "chosen": "bcd#", "rejected": "bc"},
        {"prompt": "a", "chosen": "b<eos>", "rejected": "bc#d"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    both = ["--model", str(tmp_path / "model"), "--reference", str(tmp_path / "model")]
    main(["score", *both, "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "scores.jsonl")])
    records = read_json_lines(tmp_path / "scores.jsonl")
    assert [(r["chosen_tokens"], r["rejected_tokens"]) for r in records] == [(4, 3), (2, 3)]
    assert all(r["margin"] == 0.0 for r in records)
