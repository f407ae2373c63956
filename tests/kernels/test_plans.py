"""The cost model and the memory promise: nothing above inputs and outputs but the workspace and one tile."""

import pytest
import torch
from dpo_kernels import choose_plan, linear_token_logps

from bench.memory import allocated_peak

SIZE = (512, 32000, 512)


def test_the_cheapest_plan():
    assert choose_plan(*SIZE, torch.float32, False).name == "frozen"
    retained = choose_plan(*SIZE, torch.float32, True)
    assert (retained.name, retained.gemms) == ("retain", 3.0)
    assert choose_plan(*SIZE, torch.float32, True, 0).gemms == 4.0
    half = choose_plan(*SIZE, torch.float32, True, retained.workspace_bytes // 2)
    assert half.name == "retain"
    assert 3.4 < half.gemms < 3.6
    assert choose_plan(*SIZE, torch.float32, False, hidden_requires_grad=False).name == "score"
    # [N, H] does not fit: no frozen plan, but the weight's gradient is still saved.
    assert choose_plan(*SIZE, torch.float32, False, 1000).gemms == 3.0
    # With a tiny H a GEMM costs less than writing its tiles out and reading them back.
    assert choose_plan(512, 32000, 4, torch.float32, True).name == "recompute"


@pytest.mark.parametrize("budget", [0, 10_000_000, 30_000_000, 1 << 30])
def test_budget_is_kept(budget):
    for name in ("auto", "retain", "recompute"):
        found = choose_plan(*SIZE, torch.float32, True, budget, plan=name)
        assert found.workspace_bytes <= budget


def test_tiles_cover_everything_once():
    for rows, vocabulary in [(1, 1), (5, 7), (513, 32000), (4096, 151936), (3, 262144)]:
        found = choose_plan(rows, vocabulary, 64, torch.float32, True)
        assert [stop for _, _, stop in found.columns()][-1] == vocabulary
        assert [stop for _, _, stop in found.chunks()][-1] == rows
        assert len(list(found.columns())) == found.vocab_tiles
        assert len(list(found.chunks())) == found.row_chunks
        indices = {found.tile_index(k, c) for k, _, _ in found.columns() for c, _, _ in found.chunks()}
        assert indices == set(range(found.vocab_tiles * found.row_chunks))
        assert found.row_chunk * found.vocab_tile <= 2 * max(2**20, found.row_chunk)


@pytest.mark.parametrize("width", [96, 256])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("plan", "budget"),
    [("frozen", 1 << 20), ("recompute", 0), ("retain", 6 << 20), ("retain", 1 << 30), ("auto", 9 << 20)],
)
def test_peak_memory(plan, budget, autocast, width):
    rows, vocabulary = 256, 16000
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=plan != "frozen")
    targets, grad = torch.randint(vocabulary, (rows,)), torch.randn(rows)
    needed = [hidden, weight] if weight.requires_grad else [hidden]

    def work():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            lp = linear_token_logps(hidden, weight, targets, plan=plan, workspace_bytes=budget)
        return lp.detach(), *torch.autograd.grad(lp, needed, grad)

    work()
    dtype = torch.bfloat16 if autocast else torch.float32
    lender = weight.dtype if weight.requires_grad else None
    chosen = choose_plan(
        rows, vocabulary, width, dtype, weight.requires_grad, budget, plan=plan, weight_grad_dtype=lender
    )
    outputs = 4 * (rows + sum(part.numel() for part in needed))
    per_row = 64 * 8 * rows  # a few dozen [N] vectors
    peak = allocated_peak(work)
    extra = peak - outputs
    assert extra <= budget + chosen.tile_bytes + per_row
    assert extra <= chosen.workspace_bytes + chosen.tile_bytes + per_row
    if plan == "retain" and width == rows:  # every tile fits into the gradient's memory
        assert chosen.gemms == 3.0
        assert chosen.workspace_bytes == 0
    # Far from the [N, V] logits that the tiles stand for, unless they were asked for.
    if plan in ("frozen", "recompute"):
        assert extra < 0.6 * rows * vocabulary * dtype.itemsize + chosen.tile_bytes
