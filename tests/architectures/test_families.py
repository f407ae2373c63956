"""Families of models: packed and shared forwards are exact or refused by name; the README's table is what is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from dpo.checks import check_sharing
from dpo.errors import UserError
from dpo.model import prepare, shared_logps
from dpo.packing import Group, pack
from dpo.steps import StepPlan, build_step
from dpo.support import length_limit, refuse_data, refuse_dropout
from tests.architectures.families import (
    GRADIENT_BOUND,
    LOGP_BOUND,
    build,
    judge,
    model_types,
    readme_table,
    table,
)
from tests.packing.helpers import gradient_error, gradients, make_groups, plain_logps, wide_softmax
from tests.train.toy import Groups

MUST_PASS = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "gpt2"),
    *("granite", "cohere2", "starcoder2", "smollm3", "mixtral", "qwen3_moe", "glm4"),
)
REFUSED = {
    "gpt_oss": "attention sinks",
    "lfm2": "state-space or linear attention layers",
    "llama4": "chunked_attention layers",
    "doge": "no attention mask beside",
    "nemotron": "did not reach NemotronAttention",
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("model_type", MUST_PASS)
def test_every_layout_is_exact(model_type: str) -> None:
    verdict = judge(model_type)
    assert (verdict.untried, verdict.wrong) == ("", {})
    assert set(verdict.refusals.values()) == {""}


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_by_name_with_the_flag_that_helps(model_type: str) -> None:
    verdict = judge(model_type)
    assert (verdict.untried, verdict.wrong) == ("", {})
    for layout in ("shared", "packed"):
        assert REFUSED[model_type] in verdict.refusals[layout]
        assert "use --padded" in verdict.refusals[layout]
    assert verdict.refusals["padded"] == ""


@pytest.mark.parametrize("model_type", ["bert", "phimoe"])
def test_refused_altogether(model_type: str) -> None:
    assert "" not in judge(model_type).refusals.values()


@pytest.mark.slow
def test_the_table_of_families_is_what_is_found() -> None:
    verdicts = [judge(model_type) for model_type in model_types()]
    assert {v.model_type: v.wrong for v in verdicts if v.wrong} == {}
    if readme_table()[0] == table([])[0]:  # the table is of one version of Transformers
        assert readme_table() == table(verdicts), "python -m tests.architectures.families writes the table anew"


def test_the_table_lists_the_registry() -> None:
    lines = readme_table()
    if lines[0] != table([])[0]:
        pytest.skip(f"the table is not of Transformers {transformers.__version__}")
    listed = {line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")}
    untried = {name for name in model_types() if f"`{name}`" in lines[-1]}
    assert set(model_types()) == listed - {"model type"} | untried
    assert all(any(line.startswith(f"| {name} | yes | yes | yes |") for line in lines) for name in MUST_PASS)


@pytest.mark.parametrize("tied", [False, True])
def test_heads_with_a_bias_and_tied_weights_are_exact(tied: bool) -> None:
    model = build("phi", tie_word_embeddings=tied)
    head = model.get_output_embeddings()
    assert head is not None
    assert head.bias is not None
    assert (head.weight is model.get_input_embeddings().weight) == tied
    groups = make_groups((2, 3))
    expected = plain_logps(model, groups)
    expected_gradients = gradients(model, expected)
    with wide_softmax():
        logps = shared_logps(model, pack(groups)).token_logps
        assert (logps - expected).abs().max() < LOGP_BOUND
        assert gradient_error(gradients(model, logps), expected_gradients) < GRADIENT_BOUND


# --- Rotary scaling that depends on the length ------------------------------------------------------------------------

LIMIT = 16


def longrope() -> transformers.PreTrainedModel:
    factors = torch.linspace(1.0, 3.0, 4).tolist()
    rope: dict[str, Any] = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": factors,
        "long_factor": [4 * factor for factor in factors],
        "original_max_position_embeddings": LIMIT,
        "partial_rotary_factor": 1.0,
    }
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=LIMIT, sliding_window=None)
    assert length_limit(model) == LIMIT
    return model


def on_both_sides() -> Groups:
    """A group on either side of the limit, and one with completions on both."""
    lengths = [(5, (3, 4)), (14, (9, 6)), (10, (2, 9, 6, 7))]
    return Groups(
        Group(range(3, 3 + prompt), [range(20 + y, 20 + 2 * y) for y in ys], [(0, 1)], row)
        for row, (prompt, ys) in enumerate(lengths)
    )


def test_longrope_bins_by_regime_and_both_are_exact() -> None:
    model, groups = longrope(), on_both_sides()
    step = build_step(groups, range(3), StepPlan(length_limit=LIMIT))
    assert len(step.bins) == 2
    assert step.coupled is not None
    assert len(step.coupled.bins) == 2
    expected = iter(plain_logps(model, groups).split([len(y) for group in groups for y in group.completions]))
    by_place = {(g, c): next(expected) for g, group in enumerate(groups) for c in range(len(group.completions))}
    prepare(model, "shared")
    sides, seen = [], []
    for b in step.all_bins:
        short, long = b.batch.sequence_lengths
        assert (short > LIMIT) == (long > LIMIT)
        sides.append(long > LIMIT)
        with wide_softmax():
            found = shared_logps(model, b.batch).token_logps
        places = [(g, c) for g, completions in b.members for c in completions]
        assert (found - torch.cat([by_place[place] for place in places])).abs().max() < LOGP_BOUND
        seen += places
    assert sides == [False, True, False, True]
    assert sorted(seen) == sorted(by_place)


def test_longrope_is_checked_on_one_side_of_the_limit_and_mixing_is_refused() -> None:
    model, groups = longrope().float(), on_both_sides()
    assert check_sharing(model, groups).max_abs_error < 1e-4
    with pytest.raises(UserError, match=r"'longrope'.*changes at 16 tokens"):
        shared_logps(model, pack(groups))


def test_dynamic_scaling_refuses_data_beyond_its_limit() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    model = build("llama", rope_parameters=rope, max_position_embeddings=32)
    refuse_data(model, [10, 32], "--data")
    with pytest.raises(UserError, match=r"--data: .*'dynamic'.* found 33: lower --max-prompt-length"):
        refuse_data(model, [10, 33], "--data")
    assert length_limit(model) is None


# --- Dropout ----------------------------------------------------------------------------------------------------------


def test_attention_dropout_needs_padded_rows() -> None:
    model = build("gpt2")
    refuse_dropout(model, "shared")
    model.config.attn_pdrop = 0.1
    with pytest.raises(UserError, match=r"--dropout: GPT2LMHeadModel drops attention weights \(attn_pdrop 0\.1\)"):
        refuse_dropout(model, "shared")
    refuse_dropout(model, "padded")
    model.config.attn_pdrop, model.config.resid_pdrop = 0.0, 0.1
    refuse_dropout(model, "shared")
