"""The table for people who come from TRL: complete on their side, true on ours."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from dpo.config import TrainConfig

SECTION = re.search(
    r"^## Coming from TRL\n(.*?)^## ",
    (Path(__file__).parent.parent.parent / "dpo" / "README.md").read_text(),
    re.MULTILINE | re.DOTALL,
)
assert SECTION is not None
ROWS = [line.strip("| ").split(" | ") for line in SECTION[1].splitlines() if line.startswith("| `")]


def test_every_flag_that_the_table_names_exists():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    named = {flag for _, ours in ROWS for flag in re.findall(r"`(--[a-z-]+)", ours)}
    assert len(named) > 25
    assert named <= flags, named - flags


def test_every_choice_that_the_table_names_exists():
    kinds = {field.name: str(field.type) for field in dataclasses.fields(TrainConfig)}
    choices = [found for _, ours in ROWS for found in re.findall(r"`--([a-z-]+) ([a-z0-9-]+)`", ours)]
    assert choices
    for name, choice in choices:
        assert choice in re.findall(r"[\w-]+", kinds[name.replace("-", "_")]), (name, choice)


@pytest.mark.peers
def test_every_field_of_dpo_config_is_in_the_table():
    trl = pytest.importorskip("trl")
    transformers = pytest.importorskip("transformers")

    listed = {name for theirs, _ in ROWS for name in re.findall(r"`([a-z_]+)`", theirs)}
    own = set(trl.DPOConfig.__annotations__)
    assert len(own) > 20
    assert own <= listed, own - listed
    known = own | {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    assert listed <= known, listed - known
