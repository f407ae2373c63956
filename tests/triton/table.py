"""Write the machine-code and traffic figures of the kernels as a table.

    python -m tests.triton.table > bench/results/kernels.md

Registers, warps and bytes in flight a multiprocessor (a compute unit on gfx942) come from code compiled offline;
bytes over the minimum from interpreted launches. Nothing here was timed on a GPU.
"""

import sys

import torch
import triton
from dpo_kernels.common import LogitOptions
from dpo_kernels.tri.logits import logps_backward, logps_forward

from tests.harness.interpret import interpret
from tests.harness.offline import TARGETS, MachineCode
from tests.harness.traffic import count_traffic
from tests.triton.test_offline import compile_finishers, compile_fused, compile_logits, compile_tiles

HEADER = (
    "| kernel | V or v | target | registers | stack | shared | warps | in flight | 128-bit loads + stores in loops |"
)


def line(code: MachineCode, vocabulary: int | str) -> str:
    loads, stores = (code.count(p, loop=True) for p in (r"LDG\S*128|\w+_load_dwordx4", r"STG\S*128|\w+_store_dwordx4"))
    name = code.name.removesuffix("_kernel")
    return (
        f"| {name} | {vocabulary} | {code.target} | {code.registers} | {code.stack} | {code.shared} "
        f"| {code.warps_per_multiprocessor} | {code.bytes_in_flight // 1024} KB | {loads} + {stores} |"
    )


def machine_table() -> list[str]:
    lines = [HEADER, "|---" * 9 + "|"]
    for target in TARGETS:
        for vocabulary in (128256, 50257):
            lines += [line(c, vocabulary) for c in compile_logits(target, torch.bfloat16, vocabulary)]
            lines += [line(c, vocabulary) for c in compile_fused(target, torch.bfloat16, vocabulary)]
        lines += [line(c, 1024) for c in compile_tiles(target, torch.bfloat16, 1024)]
        seen = {c.name: c for c in reversed(compile_finishers(target))}
        lines += [line(c, "-") for c in seen.values()]
    return lines


def traffic_table() -> list[str]:
    lines = ["| V | dtype | forward | backward | exponentials an element |", "|---" * 5 + "|"]
    options = LogitOptions()
    for vocabulary in (1000, 32000, 50257, 128256, 151936, 262144):
        for dtype in (torch.bfloat16, torch.float32):
            logits, targets = torch.randn(2, vocabulary).to(dtype), torch.zeros(2, dtype=torch.long)
            with interpret(), count_traffic() as forward:
                _, row_max, inverse, _ = logps_forward(logits, targets, options)
            with interpret(), count_traffic() as backward:
                logps_backward(logits, targets, row_max, inverse, torch.ones(2), options)
            least = 2 * vocabulary * dtype.itemsize
            moved = [sum(t.loaded.values()) + sum(t.stored.values()) for t in (forward, backward)]
            lines.append(
                f"| {vocabulary} | {str(dtype).removeprefix('torch.')} | {moved[0] / least:.4f} "
                f"| {moved[1] / (2 * least):.4f} | {forward.exponentials / (2 * vocabulary):.3f} |"
            )
    return lines


def main() -> None:
    print("# Kernels, without a GPU\n")
    print(f"triton {triton.__version__}, bf16, aligned and odd vocabularies; `python -m tests.triton.table`.\n")
    print(*machine_table(), sep="\n")
    print("\nBytes over the minimum (one read forward; one read and one write backward), interpreted:\n")
    print(*traffic_table(), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
