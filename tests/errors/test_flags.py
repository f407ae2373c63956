"""Words of the command line: all that is meant to be read is read, whatever is refused gets one line."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import dpo.cli
from dpo.cli import COMMANDS, parse
from dpo.errors import UserError
from dpo.flags import _ELSEWHERE


def _words(config: Any) -> list[str]:
    """Every setting of a configuration, written out."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if field.name == "config" or (type(config).__name__ == "CacheConfig" and field.name == "beta"):
            continue
        if type(config).__name__ == "ReportConfig" and field.name == "run":
            words.append(value)
        elif isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return words


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_is_read_as_it_is_written(command):
    required = {f.name: "x" for f in dataclasses.fields(COMMANDS[command]) if f.default is dataclasses.MISSING}
    config = COMMANDS[command](**required)
    assert parse([command, *_words(config)]) == config


def test_other_ways_to_write_a_flag():
    base = ["train", "--model", "m", "--data=d"]
    found = parse([*base, "--max_steps", "3", "--beta=0.2", "--log-to", "wandb", "trackio", "--no-share_prefix"])
    assert (found.max_steps, found.beta, found.log_to, found.share_prefix) == (3, 0.2, ("wandb", "trackio"), False)
    assert parse([*base, "--lr", "-1", "--lr", "1e-4", "--output", "-"]).lr == 1e-4


def test_what_the_parser_alone_refuses_is_one_line_too(monkeypatch):
    monkeypatch.setattr(dpo.cli, "check_words", lambda *words, **options: None)
    good = ["--model", "m", "--data", "d"]
    for words, named in (([*good, "--beta", "much"], "--beta"), ([*good, "--betta", "1"], "--betta"), ([], "--model")):
        with pytest.raises(UserError, match=named) as error:
            parse(["train", *words])
        assert "\n" not in str(error.value)
        assert not set("╭│╰─") & set(str(error.value))


def test_names_of_other_trainers_lead_to_flags_that_exist():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(COMMANDS["train"])}
    assert set(_ELSEWHERE.values()) <= flags
    assert not set(_ELSEWHERE) & flags
