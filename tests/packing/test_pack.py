"""Layout tables: one example by hand, then properties of random ones."""

from __future__ import annotations

import pickle
from typing import get_args

import numpy as np
import pytest
import torch

import dpo
from dpo.errors import UserError
from dpo.packing import Group, Layout, group_cost, pack, plan_bins, plan_groups, split_group
from tests.packing.helpers import make_groups

PROMPT, ONE, TWO = [10, 11, 12], [20, 21], [30]
GROUPS = [Group(PROMPT, [ONE, TWO], [(1, 0)], row=7), Group([40], [[50], [51, 52], [53]], [(0, 1), (2, 1)], row="b")]


def test_shared_by_hand():
    batch = pack(GROUPS)
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 40, 50, 51, 52, 53]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2, 1]]
    # the prompts' last rows (2 and 6) appear once a completion
    assert batch.logit_rows.tolist() == [2, 3, 2, 6, 6, 8, 6]
    assert batch.targets.tolist() == [20, 21, 30, 50, 51, 52, 53]
    assert batch.completion_ids.tolist() == [0, 0, 1, 2, 3, 3, 4]
    assert batch.chosen.tolist() == [1, 2, 4]
    assert batch.rejected.tolist() == [0, 3, 3]
    assert batch.completion_lengths.tolist() == [2, 1, 1, 2, 1]
    assert batch.group_of_completion.tolist() == [0, 0, 1, 1, 1]
    assert (batch.rows, batch.attention_mask, batch.sequence_lengths) == ((7, "b"), None, (2, 5))
    assert (batch.num_groups, batch.num_completions, batch.num_pairs, batch.num_tokens) == (2, 5, 3, 11)
    segments = batch.segments
    assert segments is not None
    assert segments.q_start == (0, 5, 6, 8, 10)
    assert segments.q_stop == (5, 6, 8, 10, 11)
    assert segments.prefix_start == (0, 0, 6, 6, 6)
    assert segments.prefix_stop == (0, 3, 6, 7, 7)
    assert segments.cu_seqlens_q.tolist() == [0, 5, 6, 8, 10, 11]
    assert segments.cu_seqlens_k.tolist() == [0, 5, 9, 11, 14, 16]
    assert segments.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9, 6, 10]
    assert segments.cu_seqlens_q.dtype == segments.cu_seqlens_k.dtype == torch.int32
    assert (segments.max_q, segments.max_k, segments.rounds) == (5, 5, (4, 1))


def test_packed_by_hand():
    batch = pack(GROUPS[:1], layout="packed")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21, 10, 11, 12, 30]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.logit_rows.tolist() == [2, 3, 7]
    assert batch.segments is not None
    assert not batch.segments.shares
    assert batch.segments.cu_seqlens_k.tolist() == [0, 5, 9]


def test_padded_by_hand():
    batch = pack(GROUPS[:1], layout="padded")
    assert batch.input_ids.tolist() == [[10, 11, 12, 20, 21], [10, 11, 12, 30, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch.logit_rows.tolist() == [2, 3, 7]
    assert batch.targets.tolist() == [20, 21, 30]
    assert batch.segments is None


@pytest.mark.parametrize("layout", get_args(Layout))
def test_targets_and_their_rows(layout):
    groups = make_groups((1, 4, 2, 3, 5), seed=3)
    batch = pack(groups, layout=layout)
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    completion = 0
    for group in groups:
        for y in group.completions:
            mine = batch.completion_ids == completion
            assert batch.targets[mine].tolist() == list(y)
            rows = batch.logit_rows[mine]
            # each row holds the token before its target, at the position before it
            assert ids[rows].tolist() == [group.prompt[-1], *y[:-1]]
            assert positions[rows].tolist() == list(range(len(group.prompt) - 1, len(group.prompt) + len(y) - 1))
            completion += 1
    assert batch.num_tokens == sum(group_cost(group, layout) for group in groups) or layout == "padded"


def test_pickles_without_its_scratch_and_maps_every_tensor():
    batch = pack(GROUPS)
    assert batch.segments is not None
    batch.segments.cache["mask"] = torch.zeros(1000)
    again = pickle.loads(pickle.dumps(batch))
    assert again.segments.cache == {}
    assert torch.equal(again.segments.key_index, batch.segments.key_index)
    assert torch.equal(again.logit_rows, batch.logit_rows)
    meta = batch.to("meta")
    assert {value.device.type for value in vars(meta).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert meta.segments is not None
    assert meta.segments.key_index.device.type == "meta"
    with pytest.raises(AttributeError):
        batch.targets = batch.targets  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (Group([], [[1], [2]], [(0, 1)], row=5), "row 5: prompt: expected at least one token"),
        (Group([1], [[1], []], [(0, 1)], row=5), "row 5: completion 1: expected at least one token"),
        (Group([1], [], [], row=5), "row 5: completions: expected at least one"),
        (Group([1], [[1], [2]], [(0, 2)], row=5), r"row 5: pairs: .*found \(0, 2\)"),
        (Group([1], [[1], [2]], [(-1, 0)], row=5), r"row 5: pairs: .*found \(-1, 0\)"),
        (Group([1], [[1], [2]], [(1, 1)], row=5), r"row 5: pairs: .*found \(1, 1\)"),
    ],
)
def test_bad_groups(group, message):
    with pytest.raises(UserError, match=message):
        pack([GROUPS[0], group])


def test_bad_arguments():
    with pytest.raises(ValueError, match="groups: expected at least one"):
        pack([])
    with pytest.raises(ValueError, match="layout: expected one of"):
        pack(GROUPS, layout="rows")  # pyright: ignore[reportArgumentType]


def test_first_fit_decreasing_by_hand():
    # 7 | 6 4 | 5 3 2: decreasing, each into the first bin with room
    assert plan_bins([5, 7, 2, 6, 4, 3], 10) == [[1, 5], [3, 4], [0, 2]]
    assert plan_bins([], 10) == []
    with pytest.raises(ValueError, match="found 11 at index 1"):
        plan_bins([3, 11], 10)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_bins_hold_every_group_once_and_keep_to_the_budget(layout):
    groups = make_groups(tuple(np.random.default_rng(5).integers(1, 5, 60).tolist()), seed=5)
    budget = 150
    plan = plan_groups(groups, budget, layout)
    assert sorted(i for members in plan.bins for i in members) == list(range(60))
    assert plan == plan_groups(groups, budget, layout)
    batches = [pack([groups[i] for i in members], layout=layout) for members in plan.bins]
    assert max(batch.num_tokens for batch in batches) <= budget
    tokens = sum(
        batch.num_tokens if batch.attention_mask is None else int(batch.attention_mask.sum()) for batch in batches
    )
    assert plan.fill == pytest.approx(tokens / (budget * len(batches)))
    assert plan.fill > {"shared": 0.85, "packed": 0.85, "padded": 0.5}[layout]


@pytest.mark.parametrize("layout", get_args(Layout))
def test_split_group(layout):
    group = make_groups((9,), seed=8)[0]
    budget = len(group.prompt) + max(len(y) for y in group.completions) + 3
    parts = split_group(group, budget, layout)
    assert len(parts) > 1
    assert sorted(i for part in parts for i in part.completions) == list(range(9))
    for part in parts:
        assert group_cost(part.group, layout) <= budget
        assert part.group.completions == [group.completions[i] for i in part.completions]
        assert (part.group.prompt, part.group.row, part.group.pairs) == (group.prompt, group.row, ())
    assert [part.completions for part in split_group(group, 10_000, layout)] == [tuple(range(9))]


def test_a_sequence_over_the_budget():
    with pytest.raises(UserError, match=r"row 3: .* has 9 tokens, more than --token-budget 8"):
        split_group(Group([1] * 5, [[1], [1] * 4], [(0, 1)], row=3), 8)


def test_public_names():
    assert dpo.pack is pack
    assert dpo.Group is Group
    assert set(dpo.__all__) <= set(dir(dpo))
    assert dpo.__version__
    with pytest.raises(AttributeError, match="nothing"):
        _ = dpo.nothing  # pyright: ignore[reportAttributeAccessIssue]
