"""Short runs of an adapter on the toy model, and what is compared of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo.cli import main
from dpo.metrics import read_json_lines
from tests.train.toy import write_model, write_pairs

LORA = "--lora-r", "4", "--lora-alpha", "32"


def write_small(folder: Path) -> Path:
    """Two models, the LM head of one tied to its embedding, and preferences."""
    write_model(folder / "model")
    write_model(folder / "tied", tie_word_embeddings=True)
    write_pairs(folder / "pairs.jsonl")
    write_pairs(folder / "held_out.jsonl", count=7, seed=1)
    return folder


def write_adapter(folder: Path, model: Path) -> Path:
    """An adapter that somebody else trained: its products are not zero."""
    peft: Any = pytest.importorskip("peft", reason="the lora extra is not installed")
    torch.manual_seed(7)
    config = peft.LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(folder)
    return folder


def train(toy: Path, output: Path, *flags: str, model: str = "model") -> list[dict]:
    words = ["train", "--model", str(toy / model), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    main([*words, "--pairs-per-step", "6", "--lr", "2e-3", "--warmup-steps", "1", "--max-steps", "4", *flags])
    return read_json_lines(output / "metrics.jsonl")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[0, 5, 9, 30, 7, 2]])).logits


def close(ours: list[dict], theirs: list[dict], tolerance: float = 2e-4) -> None:
    for a, b in zip(ours, theirs, strict=True):
        for name in ("loss", "margin", "grad_norm", "chosen_logps_per_token"):
            assert a[name] == pytest.approx(b[name], rel=tolerance, abs=tolerance / 10), (a["step"], name)


def score(*flags: str, output: Path) -> list[dict]:
    main(["score", *flags, "--output", str(output)])
    return read_json_lines(output)
