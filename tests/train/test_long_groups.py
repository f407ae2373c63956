"""Long prompts with several completions fit."""

from __future__ import annotations

import pytest

from bench.long_group import peak_of_run
from bench.workload import ModelShape


@pytest.mark.slow
def test_a_prompt_of_8000_tokens_with_four_completions_fits_in_8_gb() -> None:
    assert peak_of_run(ModelShape(), prompt=8000, completion=120, flags=["--gradient-checkpointing"]) < 8e9
