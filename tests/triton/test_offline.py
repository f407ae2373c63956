"""Limits on the machine code of the row kernels, compiled for GPUs that are not there."""

import re

import pytest
import torch
from dpo_kernels.calls import PairCall
from dpo_kernels.common import LogitOptions
from dpo_kernels.losses import KERNEL_IDS, LOSSES
from dpo_kernels.tri import KernelCall, fixed, rows, tune
from dpo_kernels.tri.fused import fused_backward, fused_forward
from dpo_kernels.tri.logits import logps_backward, logps_forward
from dpo_kernels.tri.pairs import pair_backward, pair_forward
from dpo_kernels.tri.rankings import ranking_backward, ranking_forward
from dpo_kernels.tri.tiles import TileState, fold_tile, tile_gradient

from tests.harness.offline import SHARED_LIMIT, TARGETS, compiling, machine_code

SOME_TARGETS = [t if t in ("sm_90", "gfx942") else pytest.param(t, marks=pytest.mark.slow) for t in TARGETS]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDE = r"(LDG|STG)\S*\.128|(global|buffer)_(load|store)_dwordx4"


def compile_logits(target, dtype, vocabulary, *, softcap=None, stats=0, in_place=False):
    """Machine code of the forward and backward kernels that a launch with these arguments selects."""
    logits, targets, numbers = torch.empty(4, vocabulary, dtype=dtype), torch.zeros(4, dtype=torch.long), torch.zeros(4)
    scaling = LogitOptions(softcap=softcap)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as compiled:
        patch.setattr(rows, "warp_size", lambda device: TARGETS[target].warp_size)
        logps_forward(logits, targets, scaling, stats)
        logps_backward(logits, targets, numbers, numbers, numbers, scaling, in_place=in_place)
    return [machine_code(kernel) for kernel in compiled]


def assert_streams_well(code, vocabulary):
    assert code.stack == 0
    assert code.shared <= SHARED_LIMIT[code.target]
    narrow = {name for name in code.global_accesses(loop=True) if not re.match(WIDE, name)}
    assert not narrow, f"{code.name} on {code.target}: {narrow} inside a loop"
    assert code.count(WIDE, loop=True) >= 1
    assert code.count("BAR|s_barrier", loop=True) == 0
    outside = code.global_accesses(loop=False)
    narrow_16 = sum(n for name, n in outside.items() if re.search(r"U16|ushort|_short", name))
    assert narrow_16 <= 4, outside
    if vocabulary >= 32000:
        assert code.warps_per_multiprocessor >= (16 if code.target == "gfx942" else 24)
        assert code.bytes_in_flight >= 48 * 1024


@pytest.mark.parametrize("target", SOME_TARGETS)
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_row_kernels_in_bf16(target, vocabulary):
    for code in compile_logits(target, torch.bfloat16, vocabulary):
        assert_streams_well(code, vocabulary)


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [128, 1000, 2050, 5000, 32000, 50257, 151936, 262144])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"stats": 15}, {"softcap": 30.0, "stats": 15}], ids=str)
def test_every_launch_configuration(target, dtype, vocabulary, options):
    for code in compile_logits(target, dtype, vocabulary, **options):
        assert_streams_well(code, vocabulary)


def kernel_call(loss="sigmoid", reduction="mean", **options):
    return KernelCall.of(PairCall.check(loss, 0.1, reduction, **options))


EVERY_LOSS = ",".join(KERNEL_IDS)
"""All of the arithmetic in one kernel."""


def assert_candidates_stream_well(target, dtype, vocabulary):
    """Everything that tuning may choose, for the kernels on logits and on tiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "warp_size", lambda device: TARGETS[target].warp_size)
        launches = tune.candidates(rows.launch_for(dtype, vocabulary, torch.device("cpu")))
    for launch in launches:
        with tune._forced(launch):
            codes = compile_logits(target, dtype, vocabulary)
            codes += compile_tiles(target, dtype, vocabulary)[:1] if dtype == torch.float32 else []
        for code in codes:
            assert_streams_well(code, 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_tuning_candidates_in_bf16(target):
    assert_candidates_stream_well(target, torch.bfloat16, 50257)


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [1000, 4096, 50257, 151936])
def test_every_tuning_candidate(target, dtype, vocabulary):
    assert_candidates_stream_well(target, dtype, vocabulary)


def compile_fused(
    target,
    dtype,
    vocabulary,
    *,
    padded=False,
    ref="token",
    weighted=False,
    reduction="mean",
    softcap=None,
    loss="sigmoid",
    backward=True,
    **more,
):
    """Machine code of the one-launch forward and, unless told not to, backward; more: options of the loss."""
    logits, targets = torch.empty(4, 2, vocabulary, dtype=dtype), torch.zeros(4, 2, dtype=torch.long)
    ids, index, numbers = None if padded else targets, torch.zeros(3, dtype=torch.long), torch.zeros(8)
    references = {"token": numbers, "completion": numbers[:4], "none": None}[ref]
    weights = numbers[:3] if weighted else None
    options, call = LogitOptions(softcap=softcap), kernel_call(loss, reduction, **more)
    work = torch.zeros(fixed.workspace_size(4), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as compiled:
        patch.setattr(rows, "warp_size", lambda device: TARGETS[target].warp_size)
        out = fused_forward(
            logits, targets, ids, references, index, index, weights, 4, options, call,
            ref_per_token=ref == "token", work=work,
        )  # fmt: skip
        if backward:
            fused_backward(logits, targets, ids, index, index, out, numbers[:3], 4, options, reduction)
    return [machine_code(kernel) for kernel in compiled]


def compile_finishers(target):
    """Machine code of the pair and ranking kernels."""
    values, index, numbers = torch.zeros(4), torch.zeros(3, dtype=torch.long), torch.zeros(3)
    rankings, work = torch.zeros(3, 4, dtype=torch.long), torch.zeros(fixed.workspace_size(4), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as compiled:
        patch.setattr(rows, "warp_size", lambda device: TARGETS[target].warp_size)
        for reduction in ("mean", "none"):
            for weights in (None, numbers):
                pair_forward(values, values, index, index, weights, kernel_call(reduction=reduction), work=work)
            ranking_forward(values, values, rankings, 0.1, reduction, 4, work=work)
        pair_backward(numbers.expand(2, 3), numbers, index, index, 4, work=work)
        ranking_backward(torch.zeros(3, 4), numbers, rankings, 4, work=work)
    return [machine_code(kernel) for kernel in compiled]


def compile_losses(target, losses, divergences=("reverse_kl",)):
    """Machine code of the pair kernel with each of these losses."""
    values, index, lengths = torch.zeros(4), torch.zeros(3, dtype=torch.long), torch.ones(4, dtype=torch.long)
    work = torch.zeros(fixed.workspace_size(4), dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as compiled:
        patch.setattr(rows, "warp_size", lambda device: TARGETS[target].warp_size)
        for loss in losses:
            for divergence in divergences:
                call = kernel_call(loss, f_divergence=divergence)
                pair_forward(values, values, index, index, None, call, lengths=lengths, work=work)
    return [machine_code(kernel) for kernel in compiled]


def assert_row_loop_is_wide(code, vocabulary):
    """As `assert_streams_well`, where loops over pairs make narrow accesses and barriers of their own."""
    assert code.stack == 0, f"{code.name} on {code.target}"
    assert code.shared <= SHARED_LIMIT[code.target]
    assert code.count(WIDE, loop=True) >= 1
    assert code.count_beside("BAR|s_barrier", WIDE) == 0
    assert not {name for name in code.global_accesses(loop=True) if re.search(r"U16|ushort|_short|S16", name)}
    if vocabulary >= 32000:
        assert code.warps_per_multiprocessor >= (16 if code.target == "gfx942" else 24)
        assert code.bytes_in_flight >= 48 * 1024


@pytest.mark.parametrize("target", SOME_TARGETS)
def test_fused_kernels_in_bf16(target):
    forward, backward = compile_fused(target, torch.bfloat16, 50257)
    assert_row_loop_is_wide(forward, 50257)
    assert_streams_well(backward, 50257)
    assert_ticket_is_released_and_acquired(forward)


def assert_ticket_is_released_and_acquired(code):
    """Sums, fence, ticket, invalidation, barrier, reads past L1: in that order in the machine code."""
    if code.target == "gfx942":
        order = [
            r"(global|buffer)_atomic_add_x2",
            r"buffer_wbl2 sc1",
            r"s_waitcnt vmcnt\(0\)",
            r"global_atomic_add_x2 .*sc0",
            r"s_waitcnt vmcnt\(0\)",
            r"buffer_inv sc1",
            r"s_barrier",
            r"(global|buffer)_load_dwordx2",
        ]
    else:
        order = [
            r"(REDG|RED|ATOMG)\S*ADD\.64\.STRONG\.GPU",
            r"MEMBAR\.\S*GPU",
            r"ATOMG\S*ADD\.64\.STRONG\.GPU",
            r"CCTL\.IVALL",
            r"BAR\.SYNC",
            r"LDG\.E\.64\.STRONG\.GPU",
        ]
    place = 0
    for pattern in order:
        found = [i for i, text in enumerate(code.instructions) if i >= place and re.match(pattern, text)]
        assert found, f"{code.name} on {code.target}: no {pattern} after instruction {place}"
        place = found[0] + 1
    if code.target != "gfx942":
        # The count of bad rows, then sum and marks of a pair's two completions.
        assert sum(bool(re.match(order[-1], text)) for text in code.instructions) >= 5


@pytest.mark.parametrize("target", SOME_TARGETS)
def test_pair_and_ranking_kernels(target):
    for code in compile_finishers(target):
        assert code.stack == 0, f"{code.name} on {code.target}"
        assert code.shared <= SHARED_LIMIT[target]


@pytest.mark.parametrize("target", SOME_TARGETS)
def test_every_loss_in_one_kernel(target):
    (code,) = compile_losses(target, [EVERY_LOSS])
    assert code.stack == 0
    assert code.shared <= SHARED_LIMIT[target]


MARGINS = [name for name in KERNEL_IDS if "f_divergence" in LOSSES[name].options]
DIVERGENT = [(name, divergence) for name in MARGINS for divergence in ("forward_kl", "js", "alpha")]


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("loss", "divergence"), [*((name, "") for name in KERNEL_IDS), *DIVERGENT])
def test_every_loss_behind_the_row_loop(target, loss, divergence):
    options = {"f_divergence": divergence} if divergence else {}
    for ref in ("token", "completion") if LOSSES[loss].reference else ("none",):
        (code,) = compile_fused(target, torch.bfloat16, 50257, ref=ref, loss=loss, backward=False, **options)
        assert_row_loop_is_wide(code, 50257)


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
def test_every_single_loss(target):
    for code in compile_losses(target, KERNEL_IDS) + compile_losses(target, MARGINS, ("forward_kl", "js", "alpha")):
        assert code.stack == 0, f"{code.name} on {target}"


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [128, 1000, 5000, 32000, 50257])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ref": "completion", "weighted": True},
        {"ref": "none", "padded": True},
        {"reduction": "none", "softcap": 30.0},
        {"softcap": 30.0, "weighted": True, "padded": True},
        {"loss": "sigmoid:1,sft:0.1"},
        {"loss": "ipo", "ref": "completion"},
    ],
    ids=str,
)
def test_every_fused_configuration(target, dtype, vocabulary, options):
    codes = {code.name: code for code in compile_fused(target, dtype, vocabulary, **options)}
    assert_row_loop_is_wide(codes["fused_forward_kernel"], vocabulary)
    assert_streams_well(codes["fused_backward_kernel"], vocabulary)
    assert_ticket_is_released_and_acquired(codes["fused_forward_kernel"])
    assert all(code.stack == 0 for code in codes.values())


def compile_tiles(target, compute, width, *, softcap=None, stats=0):
    """Machine code of the LM head's fold, unit-gradient and gradient kernels."""
    tile = torch.empty(4, -(-width // 16) * 16)[:, :width]
    out = torch.empty(4, -(-width // 16) * 16, dtype=compute)[:, :width]
    state, numbers = TileState.start(torch.zeros(4, dtype=torch.long), LogitOptions(softcap=softcap)), torch.zeros(4)
    with pytest.MonkeyPatch.context() as patch, compiling(target) as compiled:
        patch.setattr(rows, "warp_size", lambda device: TARGETS[target].warp_size)
        fold_tile(tile, state, 0, stats)
        tile_gradient(tile, out, state, 0, None, None)
        tile_gradient(tile, out, state, 0, numbers, numbers)
    return [machine_code(kernel) for kernel in compiled]


@pytest.mark.parametrize("target", SOME_TARGETS)
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
def test_tile_kernels(target, compute):
    for width in (1024, 1003):
        for code in compile_tiles(target, compute, width):
            assert_streams_well(code, width)


@pytest.mark.matrix
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("compute", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{"softcap": 30.0}, {"stats": 15}, {"softcap": 30.0, "stats": 15}], ids=str)
def test_every_tile_configuration(target, compute, options):
    for width in (300, 1024, 4096, 32000):
        for code in compile_tiles(target, compute, width, **options):
            assert_streams_well(code, width)
