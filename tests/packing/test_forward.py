"""The packed, prefix-shared forward against plain forwards of the same Transformers model, in values and gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch

from dpo.attention import ATTENTION
from dpo.model import prepare, shared_logps, stock_attention, trunk
from dpo.packing import Group, Layout, pack, plan_groups, split_group
from tests.packing.helpers import (
    MODELS,
    current_gradients,
    gradient_error,
    gradients,
    make_groups,
    make_model,
    packed_logps,
    plain_logps,
    wide_softmax,
)

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")


def checkpointed(model, on: bool) -> None:
    if on:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("completions", [(2, 2, 2), (4, 4), (1, 5, 2, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_exact_in_float64(name, completions, checkpointing):
    model = make_model(name, exact=True)
    groups = make_groups(completions)
    expected = plain_logps(model, groups)
    expected_gradients = gradients(model, expected)
    checkpointed(model, checkpointing)
    for layout in get_args(Layout):
        prepare(model, layout)
        with wide_softmax():
            logps, batch = packed_logps(model, groups, layout)
            found = gradients(model, logps)
        assert logps.dtype == torch.float64
        assert (logps - expected).abs().max() < 1e-10
        assert gradient_error(found, expected_gradients) < 1e-10
        sums = [part.sum() for part in expected.split(batch.completion_lengths.tolist())]
        with wide_softmax():
            found_sums = shared_logps(model, batch).completion_logps
        assert (found_sums - torch.stack(sums)).abs().max() < 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_stock_modules_in_float64(name):
    model = make_model(name)
    groups = make_groups((2, 4, 3))
    expected = plain_logps(model, groups)
    expected_gradients = gradients(model, expected)
    for layout in get_args(Layout):
        prepare(model, layout)
        with wide_softmax():
            logps, _ = packed_logps(model, groups, layout)
            assert (logps - expected).abs().max() < 1e-8
            assert gradient_error(gradients(model, logps), expected_gradients) < 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_fp32_within_1e5_a_token(name, checkpointing):
    model = make_model(name, torch.float32)
    groups = make_groups((2, 4, 3), longest=40)
    expected = plain_logps(model, groups)
    expected_gradients = gradients(model, expected)
    checkpointed(model, checkpointing)
    for layout in get_args(Layout):
        prepare(model, layout)
        logps, _ = packed_logps(model, groups, layout)
        assert logps.dtype == torch.float32
        assert (logps - expected).abs().max() < 1e-5
        assert gradient_error(gradients(model, logps), expected_gradients) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bf16_autocast_within_the_noise_of_plain_layouts(name):
    model = make_model(name, torch.float32)
    groups = make_groups((2, 4, 3), longest=40)
    exact = plain_logps(model, groups)
    with torch.autocast("cpu", torch.bfloat16):
        plain = plain_logps(model, groups)
        prepare(model, "padded")
        padded = packed_logps(model, groups, "padded")[0]
        prepare(model, "shared")
        shared = packed_logps(model, groups, "shared")[0]
    assert shared.dtype == torch.float32
    noise = max((plain - exact).abs().max(), (padded - exact).abs().max())
    assert (shared - exact).abs().max() < 2 * noise
    assert (shared - exact).pow(2).mean().sqrt() < 1.2 * (plain - exact).pow(2).mean().sqrt()


@pytest.mark.parametrize("layout", get_args(Layout))
@pytest.mark.parametrize("budget", [64, 120, 10_000])
def test_any_token_budget_gives_the_same_sum_of_gradients(layout, budget):
    model = make_model("mistral", exact=True)
    groups = make_groups((2, 3, 2, 1, 4, 2), longest=16)
    whole, _ = packed_logps(model, groups, "shared")
    weights = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64)
    model.zero_grad()
    (whole * weights).sum().backward()
    expected = current_gradients(model)
    per_group = weights.split([sum(len(y) for y in group.completions) for group in groups])
    logps_of = whole.detach().split([part.numel() for part in per_group])
    # groups larger than the budget go in parts, each with the prompt repeated
    parts, part_weights, part_logps = [], [], []
    for group, weight, logps in zip(groups, per_group, logps_of, strict=True):
        lengths = [len(y) for y in group.completions]
        for part in split_group(group, budget, layout):
            parts.append(part.group)
            part_weights.append(torch.cat([weight.split(lengths)[i] for i in part.completions]))
            part_logps.append(torch.cat([logps.split(lengths)[i] for i in part.completions]))
    plan = plan_groups(parts, budget, layout)
    assert (len(plan.bins) == 1) == (budget == 10_000)
    model.zero_grad()
    for members in plan.bins:
        batch = pack([parts[i] for i in members], layout=layout)
        assert batch.num_tokens <= budget
        logps = shared_logps(model, batch).token_logps
        assert (logps - torch.cat([part_logps[i] for i in members])).abs().max() < 1e-10
        (logps * torch.cat([part_weights[i] for i in members])).sum().backward()
    assert gradient_error(current_gradients(model), expected) < 1e-10


def test_completions_do_not_see_each_other_nor_other_groups():
    model = make_model("llama", exact=True)
    groups = make_groups((3, 2))
    before, batch = packed_logps(model, groups, "shared")
    changed = [list(y) for y in groups[0].completions]
    changed[1] = [(token + 1) % 97 for token in changed[1]]
    after, _ = packed_logps(model, [replace(groups[0], completions=changed), groups[1]], "shared")
    same = batch.completion_ids != 1
    assert torch.equal(before[same], after[same])
    assert (before[~same] - after[~same]).abs().max() > 1e-3


def test_same_values_with_and_without_gradients():
    model = make_model("llama", torch.float32)
    groups = make_groups((2, 4))
    with torch.no_grad():
        reference, _ = packed_logps(model, groups, "shared")
    policy, _ = packed_logps(model, groups, "shared")
    assert torch.equal(policy, reference)


def test_library_form_in_five_lines_switches_the_attention_itself():
    model = make_model("llama")
    batch = pack([Group(prompt=[1, 2, 3], completions=[[4, 5], [6]], pairs=[(0, 1)])])
    logps = shared_logps(model, batch)
    assert model.config._attn_implementation == ATTENTION
    assert logps.token_logps.shape == (3,)
    assert logps.completion_logps.shape == (2,)
    assert shared_logps(model, pack([Group([1], [[2]], [])], layout="padded")).token_logps.shape == (1,)
    assert model.config._attn_implementation == "sdpa"


def test_missing_segments_is_an_error_and_stock_attention_is_restored():
    model = make_model("llama")
    prepare(model, "shared")
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(RuntimeError, match="`segments` did not reach LlamaAttention"):
        model(input_ids=ids, use_cache=False)
    with stock_attention(model):
        model(input_ids=ids, use_cache=False)
    assert model.config._attn_implementation == ATTENTION


def test_a_layer_that_ignores_the_packed_attention_is_an_error():
    model = make_model("llama")
    batch = pack(make_groups((2,)))
    with pytest.raises(RuntimeError, match="0 of 3 layers used the attention"):
        trunk(model, batch)  # not prepared: stock attention would silently see the whole row


def test_a_mask_beside_segments_is_an_error():
    model = make_model("llama")
    prepare(model, "shared")
    batch = pack(make_groups((2,)))
    mask = torch.zeros(1, 1, batch.num_tokens, batch.num_tokens, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected no attention mask"):
        model(input_ids=batch.input_ids, attention_mask=mask, segments=batch.segments, use_cache=False)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_masks_are_built_once_a_batch(name, monkeypatch):
    model = make_model(name)
    prepare(model, "shared")
    batch = pack(make_groups((3, 3)))
    assert batch.segments is not None
    trunk(model, batch).sum().backward()
    masks = {key: value for key, value in batch.segments.cache.items() if isinstance(value, torch.Tensor)}
    trunk(model, batch)
    for key, value in masks.items():
        assert batch.segments.cache[key] is value
