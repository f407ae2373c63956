"""Warnings of a run: each sign on a run that shows it, none on one that does not, each told once."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from pathlib import Path

import pytest
import torch

from dpo import signs
from dpo.config import TrainConfig
from dpo.metrics import PairSums, read_json_lines
from dpo.signs import Signs
from tests.train.toy import write_model
from tests.watch.runs import even, longer, near, train, write_rows

README = Path(__file__).parent.parent.parent / "dpo" / "README.md"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("toy") / "model")


@pytest.mark.parametrize(
    ("row", "flags", "expected"),
    [
        (even, ("--max-steps", "36"), []),
        (even, ("--lr", "1e-9", "--max-steps", "36"), ["loss stuck at ln 2"]),
        (even, ("--lr", "1e-2", "--beta", "1", "--max-steps", "14"), ["margins exploding"]),
        (near, ("--lr", "5e-3", "--max-steps", "14"), ["chosen log-probs falling"]),
        (longer, ("--max-steps", "14"), ["length bias"]),
    ],
    ids=["none", "stuck", "exploding", "falling", "length"],
)
def test_a_run_that_shows_a_sign_is_told_it_once_with_advice(toy, tmp_path, capsys, row, flags, expected):
    data = write_rows(tmp_path / "pairs.jsonl", row)
    run = train(toy, data, tmp_path / "run", *flags)
    found = read_json_lines(run / "warnings.jsonl")
    assert [warning["sign"] for warning in found] == expected
    out = " ".join(capsys.readouterr().out.split())
    for warning in found:
        assert warning["message"]
        assert out.count(f"note: step {warning['step']}: {warning['message']}. {warning['advice']}") == 1
    if not expected:
        assert "note:" not in out


def test_a_run_that_goes_on_does_not_repeat_itself(toy, tmp_path, capsys):
    data = write_rows(tmp_path / "pairs.jsonl", longer)
    flags = "--max-steps", "12", "--save-every", "11", "--epochs", "9"
    run = train(toy, data, tmp_path / "run", *flags)
    before = read_json_lines(run / "warnings.jsonl")
    assert [warning["sign"] for warning in before] == ["length bias"]
    capsys.readouterr()
    train(toy, data, run, *flags, "--max-steps", "14", "--resume", "auto")
    assert len(read_json_lines(run / "metrics.jsonl")) == 14
    assert read_json_lines(run / "warnings.jsonl") == before
    assert "rewards go with length" not in capsys.readouterr().out


def record(step: int, **values: float) -> dict[str, float]:
    plain = {"loss": math.log(2), "lr": 1.0, "pairs": 8, "margin": 0.0, "chosen_reward": 0.0, "chosen_tokens": 10.0}
    return {"step": step, **plain, "rejected_tokens": 10.0, "margin_squared": 0.0, "length_correlation": 0.0} | values


def told(steps: int, **values: float) -> list[tuple[int, str]]:
    """Signs of a run whose first record is plain and all others have `values`."""
    watch = Signs(beta=0.1, lr=1.0)
    found = [(k, sign) for k in range(steps) for sign in watch.see(record(k, **(values if k else {})))]
    assert all(abs(sign.value) > abs(sign.threshold) or "stuck" in sign.sign for _, sign in found)
    return [(k, sign.sign) for k, sign in found]


@pytest.mark.parametrize(
    ("values", "sign"),
    [
        ({"chosen_reward": -0.12, "loss": 0.5}, "chosen log-probs falling"),
        ({"margin": 11.5, "loss": 0.0}, "margins exploding"),
        ({"length_correlation": 0.6, "margin_squared": 0.01, "loss": 0.6}, "length bias"),
        ({"length_correlation": -0.6, "margin_squared": 0.01, "loss": 0.6}, "length bias"),
    ],
)
def test_thresholds_hold_for_the_mean_of_a_full_window(values, sign):
    # -0.12 / beta / 10 tokens is -0.12 nats a token; the plain first record counts until the window has moved on
    assert told(30, **values) == [(9, sign)]
    assert told(9, **values) == []
    smaller = {name: value * 0.7 if name != "margin_squared" else value for name, value in values.items()}
    assert told(30, **smaller | {"loss": 0.5}) == []
    assert told(60, **values, pairs=2) == [(28, sign)]  # 8 and 28 times 2 pairs


def test_being_stuck_needs_a_loss_that_starts_at_ln2_and_a_learning_rate_at_work():
    assert told(60) == [(29, "loss stuck at ln 2")]
    assert told(60, lr=0.1) == []
    assert told(60, margin=0.05) == []
    assert told(60, loss=math.log(2) - 0.006) == []
    other = Signs(beta=0.1, lr=1.0)
    assert not [sign for k in range(60) for sign in other.see(record(k, loss=1.0 if k == 0 else math.log(2)))]


def test_small_margins_say_nothing_about_length_and_skipped_updates_nothing_at_all():
    assert told(30, length_correlation=1.0, margin_squared=0.0005, loss=0.6) == []
    watch = Signs(beta=0.1, lr=1.0)
    assert not [s for k in range(99) for s in watch.see(record(k, margin=99.0, skipped=1))]


def test_the_correlation_of_reward_and_length_by_hand():
    sums = PairSums(torch.device("cpu"))
    lengths, chosen, rejected = torch.tensor([3, 1, 2, 6]), torch.tensor([0, 2]), torch.tensor([1, 3])
    sums.add_lengths(torch.tensor([0.5, 0.2]), lengths, chosen, rejected)
    sums.sums[1] = 2
    read = sums.read()
    # margins 0.5 and 0.2 with 2 and -4 tokens more
    assert read["length_correlation"] == pytest.approx((0.5 * 2 - 0.2 * 4) / math.sqrt(0.29 * 20))
    assert read["margin_squared"] == pytest.approx(0.145)
    draw = random.Random(0)
    many = torch.tensor([draw.randint(1, 50) for _ in range(40)])
    for sign in (1, -1):
        sums = PairSums(torch.device("cpu"))
        a, b = torch.arange(0, 40, 2), torch.arange(1, 40, 2)
        sums.add_lengths(sign * 0.01 * (many[a] - many[b]), many, a, b)
        assert sums.read()["length_correlation"] == pytest.approx(sign, abs=1e-6)


def test_advice_names_flags_that_exist_and_the_readme_has_every_threshold():
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(TrainConfig)}
    source = Path(signs.__file__).read_text()
    named = set(re.findall(r"--[a-z-]+", source))
    assert named
    assert named <= flags
    text = README.read_text()
    for sign in ("chosen log-probs falling", "margins exploding", "loss stuck at ln 2", "length bias"):
        assert f'"{sign}",' in source
        assert f"| {sign} |" in text, sign
    thresholds = signs.CHOSEN_FALLING, signs.MARGIN_EXPLODING, signs.STUCK, signs.STUCK_MARGIN, signs.LENGTH_BIAS
    for value in (*thresholds, signs.STUCK_STEPS, signs.LENGTH_MARGIN, signs.WINDOW_STEPS, signs.WINDOW_PAIRS):
        assert f"{abs(value):g}" in text, value
