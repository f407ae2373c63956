"""The check on the first bin: passes when packing is right, stops the run when it is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dpo.attention
import dpo.checks
from dpo.attention import ATTENTION
from dpo.checks import check_sharing
from dpo.errors import UserError
from dpo.packing import Group
from dpo.segments import Segments
from tests.packing.helpers import MODELS, make_groups, make_model


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_passes_and_leaves_the_model_prepared(name, autocast):
    model = make_model(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        result = check_sharing(model, make_groups((2, 4, 3)))
    # fp32 weights are compared in fp32 under autocast too
    assert result.max_abs_error < 1e-5
    assert result.tolerance < 1e-3
    assert result.num_tokens == sum(len(y) for group in make_groups((2, 4, 3)) for y in group.completions)
    assert model.config._attn_implementation == ATTENTION
    assert model.training


@pytest.mark.parametrize("layout", ["shared", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_passes_with_bf16_weights(name, layout):
    result = check_sharing(make_model(name, torch.bfloat16), make_groups((2, 4, 3)), layout)
    assert result.max_abs_error <= result.tolerance


def everyone_sees_everyone(segments: Segments) -> Segments:
    """Completions attend to the completions laid out before them."""
    return Segments.build(segments.q_start, segments.q_stop, [0] * len(segments.q_start), segments.q_start)


def nobody_sees_the_prompt(segments: Segments) -> Segments:
    return Segments.build(segments.q_start, segments.q_stop, segments.q_start, segments.q_start)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("damage", [everyone_sees_everyone, nobody_sees_the_prompt])
def test_catches_broken_attention(damage, autocast, monkeypatch):
    right = dpo.attention.flash_segments

    def wrong(query, key, value, segments, scale, window=None):
        return right(query, key, value, damage(segments), scale, window)

    monkeypatch.setattr(dpo.attention, "flash_segments", wrong)
    groups = make_groups((2, 4, 3))
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        pytest.raises(UserError, match=r"differs .* --no-share-prefix .*--no-check-sharing"),
    ):
        check_sharing(make_model("llama", torch.float32), groups)


def test_catches_positions_that_do_not_restart(monkeypatch):
    right = dpo.checks.pack

    def wrong(groups, *, layout):
        batch = right(groups, layout=layout)
        if layout != "padded":
            batch.position_ids.copy_(torch.arange(batch.num_tokens))
        return batch

    monkeypatch.setattr(dpo.checks, "pack", wrong)
    with pytest.raises(UserError, match="--no-share-prefix"):
        check_sharing(make_model("llama", torch.float32), make_groups((2, 4)))


def test_catches_logits_that_the_head_does_not_describe():
    model = make_model("llama", torch.float32)
    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(UserError, match="differs"):
        check_sharing(model, make_groups((2, 2)))


def test_catches_what_is_not_a_number():
    model = make_model("llama", torch.float32)
    head = model.get_output_embeddings()
    assert head is not None
    torch.nn.init.constant_(head.weight, float("nan"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="not finite"):
        check_sharing(model, make_groups((2, 2)))


def test_an_endless_noise_allows_nothing(monkeypatch):
    right = dpo.checks.shared_logps

    def broken_when_padded(model, batch):
        result = right(model, batch)
        return replace(result, token_logps=result.token_logps / (0 if batch.layout == "padded" else 1))

    monkeypatch.setattr(dpo.checks, "shared_logps", broken_when_padded)
    with pytest.raises(UserError, match="more than inf allowed"):
        check_sharing(make_model("llama", torch.float32), make_groups((2, 2)))


def test_names_padded_when_sharing_is_already_off(monkeypatch):
    monkeypatch.setattr(dpo.attention, "flash_segments", lambda q, k, v, *_: torch.zeros_like(q).transpose(1, 2))
    with pytest.raises(UserError, match="use --padded"):
        check_sharing(make_model("llama", torch.float32), make_groups((2, 2)), "packed")


def test_costs_at_most_the_tokens_allowed():
    groups = [Group([1] * 50, [[2] * 10, [3] * 10, [4] * 10], [(0, 1)], row=i) for i in range(9)]
    model = make_model("llama", torch.float32)
    assert check_sharing(model, groups, max_tokens=400).num_tokens == 60
    # a group larger than that is still checked, with two completions
    assert check_sharing(model, groups, max_tokens=10).num_tokens == 20


@pytest.mark.parametrize("damage", [everyone_sees_everyone, nobody_sees_the_prompt])
def test_catches_broken_attention_with_bf16_weights(damage, monkeypatch):
    right = dpo.attention.flash_segments
    monkeypatch.setattr(
        dpo.attention, "flash_segments", lambda q, k, v, segments, *rest: right(q, k, v, damage(segments), *rest)
    )
    with pytest.raises(UserError, match="differs"):
        check_sharing(make_model("llama", torch.bfloat16), make_groups((2, 4, 3)))
