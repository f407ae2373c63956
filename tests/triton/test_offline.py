"""Limits on the machine code of the row kernels, compiled for GPUs that are not there."""

import re

import pytest
import torch
from dpo_kernels.common import LogitOptions
from dpo_kernels.tri import rows
from dpo_kernels.tri.logits import logps_backward, logps_forward

from tests.harness.offline import SHARED_LIMIT, TARGETS, compiling, machine_code

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


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("vocabulary", [32000, 50257])
def test_row_kernels_in_bf16(target, vocabulary):
    for code in compile_logits(target, torch.bfloat16, vocabulary):
        assert_streams_well(code, vocabulary)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocabulary", [128, 1000, 2050, 5000, 32000, 50257, 151936, 262144])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0}, {"stats": 15}, {"softcap": 30.0, "stats": 15}], ids=str)
def test_every_launch_configuration(target, dtype, vocabulary, options):
    for code in compile_logits(target, dtype, vocabulary, **options):
        assert_streams_well(code, vocabulary)
