"""The harness itself: a wrong kernel must not get past it."""

# pyright: reportArgumentType=false

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.harness.hints import FalseHint, check_hints
from tests.harness.interpret import interpret, to_bf16_bits
from tests.harness.offline import TARGETS, compiling, machine_code
from tests.harness.order import program_order
from tests.harness.traffic import OutOfBounds, count_traffic


@triton.jit
def scale_kernel(X, Y, n, OFFSET: tl.constexpr, HINT: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    cols = pid * BLOCK + tl.arange(0, BLOCK) + OFFSET
    source = tl.multiple_of(X + OFFSET, 16) if HINT else X + OFFSET
    x = tl.load(source + cols - OFFSET, mask=cols < n, other=0.0)
    tl.store(Y + cols, (x * 2.0).to(Y.dtype.element_ty), mask=cols < n)


@triton.jit
def cast_kernel(X, Y, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(Y + cols, tl.load(X + cols).to(Y.dtype.element_ty))


@triton.jit
def visit_kernel(Order, Count):
    tl.store(Order + tl.atomic_add(Count, 1), tl.program_id(0))


@triton.jit
def running_sum_kernel(X, Y, n, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.load(X + cols, mask=cols < n, other=0.0)
    tl.store(Y, tl.sum(total))


def test_bf16_rounds_like_torch_on_every_upper_half():
    halves = np.arange(2**16, dtype=np.uint32) << 16
    for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = torch.from_numpy((halves | low).view(np.float32).copy())
        values = values[~values.isnan()]
        ours = to_bf16_bits(values.numpy()).view(np.int16)
        assert (ours == values.bfloat16().view(torch.int16).numpy()).all()


def test_bf16_kernel_and_clean_exit():
    x = torch.randn(1024)
    y = torch.empty(1024, dtype=torch.bfloat16)
    with interpret():
        cast_kernel[(1,)](x, y, BLOCK=1024)
    assert torch.equal(y, x.bfloat16())
    with compiling("sm_90") as compiled:
        cast_kernel[(1,)](x, y, BLOCK=1024)
    assert compiled[0].asm["cubin"]


def test_a_false_hint_is_caught():
    x, y = torch.zeros(65), torch.zeros(65)
    with interpret(), check_hints() as seen:
        scale_kernel[(1,)](x, y, 64, OFFSET=4, HINT=True, BLOCK=64)
        assert seen["tt.divisibility"] == 1
        with pytest.raises(triton.runtime.errors.InterpreterError, match="FalseHint") as raised:
            scale_kernel[(1,)](x, y, 64, OFFSET=1, HINT=True, BLOCK=64)
    assert isinstance(raised.value.__cause__, FalseHint)


def test_bytes_are_counted_and_strays_refused():
    x, y = torch.zeros(60), torch.zeros(60)
    with interpret(), count_traffic() as traffic:
        scale_kernel[(2,)](x, y, 60, OFFSET=0, HINT=False, BLOCK=32)
    assert (traffic.loaded["X"], traffic.stored["Y"]) == (240, 240)
    with interpret(), count_traffic(), pytest.raises(triton.runtime.errors.InterpreterError) as raised:
        scale_kernel[(2,)](x, y, 61, OFFSET=0, HINT=False, BLOCK=32)
    assert isinstance(raised.value.__cause__, OutOfBounds)


def test_every_program_runs_once_in_a_different_order():
    orders = []
    for seed in range(3):
        order, count = torch.zeros(20, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        with interpret(), program_order(seed):
            visit_kernel[(20,)](order, count)
        assert sorted(order.tolist()) == list(range(20))
        orders.append(tuple(order.tolist()))
    assert len(set(orders)) == 3


@pytest.mark.parametrize("target", TARGETS)
def test_machine_code_knows_loops(target):
    with compiling(target) as compiled:
        running_sum_kernel[(1,)](torch.zeros(4096), torch.zeros(1), 4096, BLOCK=1024)
    code = machine_code(compiled[0])
    assert code.target == target
    assert code.stack == 0
    wide = [name for name in code.global_accesses(loop=True) if "128" in name or "x4" in name]
    assert wide == list(code.global_accesses(loop=True))
    assert [name for name in code.global_accesses(loop=False) if re.match(r"STG|\w+_store", name)]
    assert not [name for name in code.global_accesses(loop=True) if re.match(r"STG|\w+_store", name)]
    assert code.warps_per_multiprocessor >= 16
