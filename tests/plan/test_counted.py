"""`dpo plan` against what torch's allocator counts while the same run trains: exact, and the same on a busy machine."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dpo.cli import main
from tests.plan.counted import counted_peak
from tests.train.toy import write_model

SHAPE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 2000}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.02}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A model of 4M parameters, and 16 pairs of 200 + 2 * 150 tokens."""
    folder = tmp_path_factory.mktemp("small")
    write_model(folder / "model", **SHAPE)
    with (folder / "pairs.jsonl").open("w") as file:
        for k in range(8):
            prompt, chosen, rejected = (c * (n - 1) for c, n in (("p", 200), ("c", 150), ("r", 150)))
            file.write(json.dumps({"prompt": prompt + chr(97 + k), "chosen": chosen, "rejected": rejected}) + "\n")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--dtype fp32",
        "--dtype bf16 --optimizer adamw --reference online --gradient-checkpointing",
        "--dtype fp32 --optimizer sgd --gradient-checkpointing --ema 0.9",
        "--dtype bf16 --param-dtype bf16",
        "--dtype bf16 --lora-r 8",
        "--dtype fp32 --lora-r 8 --lora-targets q_proj,v_proj --reference online",
    ],
)
def test_tensors_of_a_run_take_what_was_planned_within_12_percent(small, tmp_path, capsys, flags):
    if "lora" in flags:
        pytest.importorskip("peft", reason="the lora extra is not installed")
    common = ["--model", str(small / "model"), "--token-budget", "1000", *flags.split()]
    data = ["--data", str(small / "pairs.jsonl"), "--output", str(tmp_path / "run"), "--log-to", "none"]
    steps = ["--pairs-per-step", "4", "--max-steps", "2", "--warmup-steps", "0", "--no-check-sharing"]
    measured = counted_peak(["train", *common, *data, *steps])
    capsys.readouterr()
    main(["plan", *common, "--completion-share", "0.6", "--device", "cpu", "--json"])
    planned = json.loads(capsys.readouterr().out)["bytes"]
    assert measured == pytest.approx(planned["live"], rel=0.12), planned
