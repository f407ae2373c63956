"""Any rows, any bytes, any YAML, any spoiled weight: it works, or it ends with status 2 and a message."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import dpo.train
from dpo.cli import main
from dpo.config import TrainConfig, to_yaml
from dpo.data import load_preferences
from dpo.errors import UserError
from tests.train.toy import write_model, write_pairs

TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "\n\nHuman: a\n\nAssistant: b", "<eos>", "\ud800", "\0"])
NUMBERS = st.integers(-(10**20), 10**20) | st.floats() | st.booleans()
ROLES = st.sampled_from(["user", "assistant", "x"]) | NUMBERS
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={"role": ROLES, "content": TEXTS}), max_size=3)
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS | MESSAGES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=5,
)
FIELDS = ["prompt", "chosen", "rejected", "completions", "scores", "ranks"]
FIELDS += ["history", "human_ref_A", "human_ref_B", "labels"]
ROWS = st.dictionaries(st.sampled_from(FIELDS) | TEXTS, VALUES, max_size=5)
PLAIN = st.fixed_dictionaries({"prompt": TEXTS | VALUES, "chosen": TEXTS | VALUES, "rejected": TEXTS | VALUES})
SCORES = st.lists(NUMBERS, max_size=4) | VALUES
SCORED = st.fixed_dictionaries({"prompt": TEXTS, "completions": st.lists(TEXTS | VALUES, max_size=4), "scores": SCORES})
FILES = st.lists(PLAIN | SCORED | ROWS | VALUES, max_size=4)

SETTING = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.text(max_size=5))
NAMES = st.sampled_from(sorted(TrainConfig.__dataclass_fields__))
SHORT = st.text(max_size=5)
TYPICAL = st.fixed_dictionaries(
    {"model": SHORT, "data": SHORT}, optional={"beta": SETTING, "log_to": SETTING, "lr": SETTING, "eval_split": SETTING}
)
MAPPINGS = (TYPICAL | st.dictionaries(NAMES | st.text(max_size=9), SETTING, max_size=4)).map(yaml.safe_dump)

SLOW = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
often = settings(max_examples=150, deadline=None, suppress_health_check=SLOW)
seldom = settings(max_examples=25, deadline=None, suppress_health_check=SLOW)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model")
    write_pairs(folder / "pairs.jsonl", count=4)
    return folder


@pytest.fixture(scope="module")
def tokenizer(toy):
    return AutoTokenizer.from_pretrained(toy / "model")


def command(*words: str) -> str | None:
    """None where the command went through, or the line that it said and ended with status 2. Fails for other ends."""
    errors, status = io.StringIO(), None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            main(list(words))
        except SystemExit as stop:
            status = stop.code
    assert status in (None, 2)
    assert status is None or re.fullmatch(r"dpo: .+\n", errors.getvalue())
    return errors.getvalue() if status else None


@often
@given(rows=FILES, kind=st.sampled_from(["jsonl", "json"]), tolerance=st.sampled_from([0.0, 0.5, 1.0]))
def test_any_rows_become_groups_or_one_line(tmp_path, tokenizer, rows, kind, tolerance):
    path, said, groups = tmp_path / f"rows.{kind}", "", []
    path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    try:
        groups = list(load_preferences(str(path), tokenizer, eos_token_ids=[1], max_bad_fraction=tolerance))
    except UserError as error:
        said = str(error)
    assert "\n" not in said
    assert bool(groups) != bool(said)
    for group in groups:
        assert group.prompt
        assert all(group.completions)
        assert group.pairs
        assert all(0 <= k < len(group.completions) for pair in group.pairs for k in pair)


@often
@given(content=st.binary(max_size=60), suffix=st.sampled_from(["jsonl", "json", "csv", "jsonl.gz"]))
def test_any_bytes_get_one_line(tmp_path, tokenizer, content, suffix):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_preferences(str(path), tokenizer, eos_token_ids=[1])
    assert "\n" not in str(error.value)


@often
@given(content=MAPPINGS.map(str.encode) | st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_yaml_is_a_configuration_or_status_2(tmp_path, content):
    path, again = tmp_path / "run.yaml", tmp_path / "again.yaml"
    path.write_bytes(content)
    taken: list[TrainConfig] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo.train, "train", taken.append)
        if command("train", "--config", str(path)) is not None:
            return
        again.write_text(to_yaml(taken[0]))
        assert command("train", "--config", str(again)) is None
    assert to_yaml(taken[1]) == to_yaml(taken[0])


@pytest.mark.slow
@seldom
@given(rows=st.lists(PLAIN | SCORED, min_size=1, max_size=3))
def test_any_rows_train_or_end_with_one_line(toy, tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model", str(toy / "model"), "--data", str(path), "--output", str(tmp_path / "run")]
    said = command(*words, "--max-steps", "1", "--overwrite", "--max-bad-fraction", "1", "--log-to", "none")
    assert said is None or (said.startswith("dpo: ") and said.count("\n") == 1)


@pytest.mark.slow
@seldom
@given(place=st.floats(0, 1), value=st.sampled_from([math.nan, math.inf, -math.inf, 3e38]))
def test_a_spoiled_weight_never_gives_scores_that_are_no_numbers(toy, tmp_path, place, value):
    """One weight spoiled anywhere: scores are all finite, or there are none."""
    folder, output = tmp_path / "model", tmp_path / "scores.jsonl"
    write_model(folder)
    weights: dict[str, Any] = load_file(folder / "model.safetensors")
    names = sorted(weights)
    spoiled = weights[names[min(int(place * len(names)), len(names) - 1)]]
    spoiled.view(-1)[int(place * (spoiled.numel() - 1))] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    output.unlink(missing_ok=True)
    words = ["score", "--model", str(folder), "--reference", str(toy / "model"), "--data", str(toy / "pairs.jsonl")]
    if command(*words, "--output", str(output), "--no-check-sharing") is not None:
        assert not output.exists()
        return
    margins = [json.loads(line)["margin"] for line in output.read_text().splitlines()]
    assert torch.isfinite(torch.tensor(margins)).all()
