"""Long prompts with several completions fit, and what a step keeps does not grow with the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import dpo.train
from bench.long_group import peak_of_run
from bench.memory import allocated_peak
from bench.workload import ModelShape
from dpo.cli import main
from dpo.engine import forward_backward
from tests.train.toy import toy_config, write_toy

SMALL, LARGE = 1_000, 32_000


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {size: write_toy(tmp_path_factory.mktemp(str(size)), vocab_size=size) for size in (SMALL, LARGE)}


def peak_of_step(toy: Path, output: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int:
    """Most bytes that the forward and backward of a run's first step hold at once, above weights and gradients."""
    found: list[int] = []

    def measured(model: Any, *arguments: Any) -> Any:
        results: list[Any] = []
        peak = allocated_peak(lambda: results.append(forward_backward(model, *arguments)))
        found.append(peak - sum(p.grad.nbytes for p in model.parameters()))
        return results[0]

    monkeypatch.setattr(dpo.train, "forward_backward", measured)
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(output)]
    main([*words, "--pairs-per-step", "24", "--max-steps", "1", "--warmup-steps", "0", *flags])
    (peak,) = found
    return peak


@pytest.mark.parametrize(
    "flags",
    [(), *(pytest.param((flag,), marks=pytest.mark.slow) for flag in ("--two-phase", "--gradient-checkpointing"))],
    ids=str,
)
def test_what_a_step_keeps_does_not_grow_with_the_vocabulary(
    toys: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    budget = ("--head-workspace-mb", "1")
    small, large = (peak_of_step(toy, tmp_path / str(k), monkeypatch, *budget, *flags) for k, toy in toys.items())
    # the head's backward may hold tiles of its weight; its logits would take 46 MB
    weight = 4 * LARGE * toy_config().hidden_size
    assert large < small + 2 * weight + (1 << 20)
    if not flags:  # what it guards against can be seen: with room for them, the logits are kept
        logits = peak_of_step(toys[LARGE], tmp_path / "logits", monkeypatch, "--head-workspace-mb", "512")
        assert logits > large + (32 << 20)


@pytest.mark.slow
def test_a_prompt_of_8000_tokens_with_four_completions_fits_in_8_gb() -> None:
    assert peak_of_run(ModelShape(), prompt=8000, completion=120, flags=["--gradient-checkpointing"]) < 8e9
