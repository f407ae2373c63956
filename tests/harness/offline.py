"""Compile kernels for GPUs that are not there, with the specialisation of a real launch, and read the machine code.

with compiling("sm_90") as compiled:
    launcher(cpu_tensors...)            # every kernel it would launch is compiled instead, nothing runs
code = machine_code(compiled[0])
code.stack, code.registers, code.loop_loads, ...
"""

# pyright: reportIncompatibleMethodOverride=false

import contextlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


class _AbsentDevice(DriverBase):
    """Enough of a driver to specialise and compile; one device number per target, since kernels are cached per
    device.
    """

    def __init__(self, name: str):
        self._name = name

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_current_target(self):
        return TARGETS[self._name]

    def get_active_torch_device(self):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_current_device(self):
        return self._name

    def get_current_stream(self, device):
        return 0


@contextlib.contextmanager
def compiling(target: str) -> Iterator[list]:
    """Inside the block a launch compiles its kernel for `target` and runs nothing; yields the list of compiled
    kernels.
    """
    compiled, run = [], JITFunction.run
    active = driver._active
    saved = {name: os.environ.get(name) for name in ("TRITON_CACHE_DIR", "TRITON_ALWAYS_COMPILE")}

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_ALWAYS_COMPILE": "1"}
        driver.set_active(_AbsentDevice(target))
        JITFunction.run = compile_only
        try:
            yield compiled
        finally:
            JITFunction.run = run
            driver._active = active
            for name, value in saved.items():
                os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@dataclass
class MachineCode:
    """What the compiler made of one kernel."""

    name: str
    target: str
    registers: int
    stack: int
    """Bytes of stack, spills and scratch together."""
    shared: int
    warps: int
    instructions: list[str]
    """Whole instructions, in program order."""
    loops: list[set[int]] = field(repr=False)
    """The instructions of each loop, an outer one's with those of its inner ones."""
    in_loop: list[bool] = field(repr=False, init=False)

    def __post_init__(self):
        self.in_loop = [False] * len(self.instructions)
        for i in set().union(*self.loops):
            self.in_loop[i] = True

    def count_beside(self, pattern: str, access: str) -> int:
        """Instructions whose text matches in loops that make accesses of the other pattern."""

        def matches(which: str, loop: set[int]) -> int:
            return sum(bool(re.match(which, self.instructions[i])) for i in loop)

        return sum(matches(pattern, loop) for loop in self.loops if matches(access, loop))

    def count(self, pattern: str, *, loop: bool | None = None) -> int:
        """Instructions whose text matches, in loops, outside them, or anywhere (None)."""
        return sum(
            bool(re.match(pattern, text)) and (loop is None or inside == loop)
            for text, inside in zip(self.instructions, self.in_loop, strict=True)
        )

    def global_accesses(self, *, loop: bool | None = None) -> Counter:
        """Global loads and stores by mnemonic."""
        pattern = r"(LDG|STG|global_(load|store)|buffer_(load|store)|flat_(load|store))"
        return Counter(
            text.split()[0]
            for text, inside in zip(self.instructions, self.in_loop, strict=True)
            if re.match(pattern, text) and (loop is None or inside == loop)
        )

    @property
    def blocks_per_multiprocessor(self) -> int:
        """Resident programs a multiprocessor (a compute unit on AMD), by registers, warps and shared memory."""
        if self.target == "gfx942":
            waves = min(8, 512 // max(8, -(-self.registers // 8) * 8)) * 4
            return min(waves // self.warps, 65536 // self.shared if self.shared else 32)
        by_registers = 65536 // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(by_registers, 64 // self.warps, SHARED_LIMIT[self.target] // (self.shared + 1024), 32)

    @property
    def warps_per_multiprocessor(self) -> int:
        return self.blocks_per_multiprocessor * self.warps

    @property
    def bytes_in_flight(self) -> int:
        """Bytes of 128-bit loop loads that all resident threads can have outstanding."""
        lanes = 64 if self.target == "gfx942" else 32
        return self.count(r"(LDG\S*\.128|\w+_load_dwordx4)", loop=True) * 16 * lanes * self.warps_per_multiprocessor


def _parse(lines: list[str], label: str, instruction: str, branch: str, ends: str) -> tuple[list[str], list[set[int]]]:
    """Instructions in order, and those of each loop.

    `branch` matches a jump and captures its label; `ends` matches instructions that never fall through. Only
    instructions without a predicate can end a block.
    """
    texts: list[str] = []
    predicated: list[bool] = []
    labels: dict[str, int] = {}
    for line in lines:
        if found := re.match(label, line):
            labels[found.group(1)] = len(texts)
        elif found := re.match(instruction, line):
            text = found.group(1).strip()
            bare = re.sub(r"^@!?U?P\w+\s+", "", text)
            predicated.append(bare != text)
            texts.append(bare)
    successors: list[list[int]] = []
    for i, text in enumerate(texts):
        jump = re.match(branch, text)
        targets = [labels[jump.group(1)]] if jump and jump.group(1) in labels else []
        falls = predicated[i] or not re.match(ends, text)
        successors.append([*targets, i + 1] if falls and i + 1 < len(texts) else targets)
    # The trap behind the last instruction of every kernel jumps to itself.
    jumps_back = {(i, t) for i, out in enumerate(successors) for t in out if t < i}
    before, loops = _reversed(successors), []
    for source, target in jumps_back:
        reachable = _reachable(successors, target)
        if source in reachable:
            loops.append(reachable & _reachable(before, source))
    return texts, loops


def _reachable(successors: list[list[int]], start: int) -> set[int]:
    seen, todo = {start}, [start]
    while todo:
        for after in successors[todo.pop()]:
            if after not in seen:
                seen.add(after)
                todo.append(after)
    return seen


def _reversed(successors: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in successors]
    for i, out in enumerate(successors):
        for after in out:
            before[after].append(i)
    return before


def machine_code(kernel) -> MachineCode:
    """Disassemble one compiled kernel."""
    meta = kernel.metadata
    common = {"name": meta.name, "shared": meta.shared, "warps": meta.num_warps}
    if meta.target.backend == "hip":
        text = kernel.asm["amdgcn"]
        number = {
            k: int(v)
            for k, v in re.findall(r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", text)
        }
        texts, loops = _parse(
            text.splitlines(), r"^(\.LBB\S+):", r"^\t([a-z]\w+.*)", r"s_c?branch\S*\s+(\S+)", r"s_branch|s_endpgm"
        )
        stack = number["private_segment_fixed_size"] + number["vgpr_spill_count"]
        return MachineCode(
            target=meta.target.arch,
            registers=number["vgpr_count"],
            stack=stack,
            instructions=texts,
            loops=loops,
            **common,
        )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        )
        sass = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True)
    number = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout + usage.stderr)}
    texts, loops = _parse(
        sass.stdout.splitlines(),
        r"^\s*(\.L_x_\w+):",
        r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);",
        r"BRA\S*\s.*`\((\.L_x_\w+)\)",
        r"BRA\s|EXIT",
    )
    return MachineCode(
        target=f"sm_{meta.target.arch}",
        registers=number["REG"],
        stack=number["STACK"] + number["LOCAL"],
        instructions=texts,
        loops=loops,
        **common,
    )
