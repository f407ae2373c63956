"""`dpo plan`: what it says against sizes worked out by hand, and against the memory that runs take."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from dpo.cli import main
from dpo.commands import PlanConfig
from dpo.metrics import read_json_lines
from dpo.plan_memory import plan_memory
from tests.plan.sizes import sizes
from tests.ranks import spawn
from tests.train.toy import toy_config, write_model

WIDE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "vocab_size": 8000}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model of 29M parameters, and pairs of 200 + 2 * 150 tokens."""
    folder = tmp_path_factory.mktemp("plan")
    write_model(folder / "model", **WIDE, initializer_range=0.02)
    with (folder / "pairs.jsonl").open("w") as file:
        for k in range(16):
            prompt, chosen, rejected = (c * (n - 1) for c, n in (("p", 200), ("c", 150), ("r", 150)))
            file.write(json.dumps({"prompt": prompt + chr(97 + k), "chosen": chosen, "rejected": rejected}) + "\n")
    return folder


def _gib(capsys, *words: str) -> dict:
    main(["plan", *words, "--json"])
    return json.loads(capsys.readouterr().out)


def test_parameters_gradients_and_optimizer_are_those_of_the_published_shapes(capsys):
    for name, billions in (("1b", 1.236), ("8b", 8.030)):
        found = _gib(capsys, "--model", name, "--optimizer", "adamw")["bytes"]
        assert found["total_parameters"] / 1e9 == pytest.approx(billions, abs=1e-3)
        assert found["parameters"] == found["gradients"] == found["optimizer"] / 2 == 4 * found["total_parameters"]
    assert found["peak"] > found["parameters"] * 4 + found["activations"]
    less = _gib(capsys, "--model", "8b", "--optimizer", "adamw", "--head-workspace-mb", "1")["bytes"]
    assert less["head"] < found["head"]


def test_activations_are_what_a_block_keeps(capsys, wide):
    """fp32, worked out: norms keep their input, its scale and (cast) output, linears their input, ..."""
    found = _gib(capsys, "--model", str(wide / "model"), "--dtype", "fp32", "--token-budget", "1000")["bytes"]
    hidden, inner, heads, kv, head = 512, 1376, 8, 4, 64
    norm = 2 * hidden + 1  # its input, its normalised input (which the weight multiplies), and the mean square
    norm += hidden  # and what comes out: the linears' input
    attention = (heads + 2 * kv) * head + heads * head + heads  # q, k, v, output, log-sum-exp
    mlp = 4 * inner  # gate, silu(gate), up, and their product
    by_hand = 4 * 8 * (2 * norm + attention + mlp) * 1000
    assert found["activations"] == pytest.approx(by_hand, rel=0.02)


@pytest.mark.parametrize(
    ("flags", "name", "ratio"),
    [
        ("--token-budget 16384", "activations", (1.99, 2.01)),
        ("--completion-share 0.1", "head", (0, 0.9)),
        ("--bins 1", "live", (0, 0.99)),
        ("--dtype fp32", "activations", (1.2, 2)),
        ("--dtype fp16", "live", (1, 1)),
        ("--param-dtype bf16", "parameters", (0.5, 0.5)),
        ("--param-dtype bf16", "masters", None),
        ("--param-dtype bf16 --bf16-update random", "live", (0, 0.99)),
        ("--optimizer adamw", "optimizer", (2, 2)),
        ("--optimizer sgd", "optimizer", (0, 0)),
        ("--ema 0.99", "masters", None),
        ("--reference online", "reference", None),
        ("--gradient-checkpointing", "activations", (0, 0.2)),
        ("--ranks 4", "live", (1, 1)),
        ("--ranks 4 --parallel fsdp", "parameters", (0.25, 0.25)),
        ("--ranks 4 --parallel fsdp", "gathered", None),
        ("--ranks 4 --memory-gib 0.3", "optimizer", (0.25, 0.25)),
    ],
    ids=str,
)
def test_every_flag_moves_memory_the_way_it_should(capsys, two_blocks, base, flags, name, ratio):
    """ratio: least and most of the plan without the flags; None where that has nothing of it."""
    found = _gib(capsys, "--model", two_blocks, *flags.split())["bytes"][name]
    if ratio is None:
        assert base[name] == 0 < found
    else:
        assert ratio[0] * base[name] <= found <= ratio[1] * base[name]


@pytest.fixture(scope="module")
def two_blocks(tmp_path_factory):
    """A config.json."""
    folder = tmp_path_factory.mktemp("two")
    toy_config(**WIDE | {"num_hidden_layers": 2}).save_pretrained(folder)
    return str(folder / "config.json")


@pytest.fixture(scope="module")
def base(two_blocks):
    return asdict(plan_memory(PlanConfig(model=two_blocks)))


def test_an_adapter_moves_memory_the_way_it_should(capsys, two_blocks, base):
    pytest.importorskip("peft", reason="the lora extra is not installed")
    words = "--model", two_blocks, "--lora-r", "8"
    lora = _gib(capsys, *words)["bytes"]
    inputs = 6 * 512 + 1376  # of the linear layers of a block: q, k, v, o, gate, up, and down
    outputs = 512 + 2 * 256 + 512 + 2 * 1376 + 512
    assert lora["gradients"] == lora["optimizer"] == 4 * 8 * 2 * (inputs + outputs)
    assert lora["parameters"] < base["parameters"], "frozen linear weights are stored in bf16"
    few = _gib(capsys, *words, "--lora-targets", "q_proj")["bytes"]
    assert few["gradients"] == 4 * 8 * 2 * 1024
    four = _gib(capsys, *words, "--load-in-4bit")["bytes"]
    assert four["parameters"] < lora["parameters"]


def test_the_table_says_whether_a_run_fits(capsys, wide):
    main(["plan", "--model", str(wide / "model")])
    assert "fits into 80 GiB" in capsys.readouterr().out
    main(["plan", "--model", "70b"])
    out = capsys.readouterr().out
    assert "does not fit into 80 GiB" in out
    assert "70.55B parameters" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "/nowhere/at/all"), "--model /nowhere/at/all: expected"),
        (("--model", "1b", "--ranks", "0"), "--ranks: expected a positive number, found 0"),
        (("--model", "1b", "--completion-share", "2"), "--completion-share: expected 0 < value <= 1, found 2.0"),
        (("--model", "1b", "--ema", "1"), "--ema: expected 0 < value < 1, found 1.0"),
        (("--model", "1b", "--param-dtype", "bf16", "--dtype", "fp32"), "--param-dtype bf16: expected --dtype bf16"),
        (("--model", "1b", "--bf16-update", "random"), "--bf16-update: expected --param-dtype bf16 beside it"),
        (("--model", "1b", "--lora-targets", "q_proj"), "--lora-targets: expected --lora-r beside it, found none"),
        (("--model", "1b", "--load-in-4bit"), "--load-in-4bit: expected --lora-r beside it, found none"),
        (("--model", "1b", "--lora-r", "4", "--load-in-4bit", "--device", "cpu"), "expected a CUDA device, found cpu"),
        (("--model", "1b", "--parallel", "ddp"), "--parallel ddp: expected more than one of --ranks, found 1"),
    ],
    ids=str,
)
def test_bad_input_gets_one_line_and_status_2(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_table_of_the_readme_is_what_plan_says():
    assert sizes() in (spawn.ROOT / "dpo" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "fp32", "--optimizer", "rmsprop", "--reference", "cached"),
        ("--dtype", "bf16", "--optimizer", "adamw", "--reference", "online", "--gradient-checkpointing"),
    ],
    ids=["fp32", "bf16-checkpointing"],
)
def test_a_process_on_the_cpu_takes_what_was_planned_within_15_percent(capsys, wide, tmp_path, flags):
    """Peak resident memory of a fresh process, against the plan of the same bins."""
    common = ["--model", str(wide / "model"), "--token-budget", "2000", *flags]
    words = ["-m", "dpo.cli", "train", *common, "--data", str(wide / "pairs.jsonl"), "--output", str(tmp_path / "run")]
    words += ["--pairs-per-step", "8", "--max-steps", "2", "--no-check-sharing", "--warmup-steps", "0"]
    ((status, _, errors),) = spawn.alone(*words)
    assert status == 0, errors
    measured = read_json_lines(tmp_path / "run" / "metrics.jsonl")[-1]
    assert measured["bins"] == 2
    planned = _gib(capsys, *common, "--completion-share", "0.6", "--device", "cpu")["bytes"]
    assert measured["peak_memory_bytes"] == pytest.approx(planned["peak"], rel=0.15), planned
    assert planned["live"] > planned["runtime"], "the libraries must not decide"
    assert planned["peak"] == planned["live"] + planned["runtime"] + planned["gaps"]
    assert planned["gaps"] > 0
