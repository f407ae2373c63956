"""What this machine is: versions, processors, memory. Goes into `dpo doctor`, every run folder and every report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from dpo import __version__

PACKAGES = ("torch", "triton", "transformers", "datasets", "safetensors", "tyro", "matplotlib")
GIB = 1 << 30


def version(name: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """What computes: this package, Python, and the packages under it."""
    return {"fused-dpo": __version__, "python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def describe_cpu() -> dict[str, Any]:
    """Name, instruction set, cores that may be used, threads, memory."""
    free, total = free_memory()
    return {
        "device": "cpu",
        "name": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_free_bytes": free,
        "memory_total_bytes": total,
    }


def describe_gpu(index: int) -> dict[str, Any]:
    """Name, compute capability, runtime, memory, and whether bf16 is fast."""
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {
        "device": f"cuda:{index}",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "runtime": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
        "bf16": torch.version.hip is not None or properties.major >= 8,
        "memory_free_bytes": free,
        "memory_total_bytes": total,
    }


def describe_device(device: torch.device) -> dict[str, Any]:
    """The device that a run computes on."""
    return describe_cpu() if device.type == "cpu" else describe_gpu(device.index or 0)


def cpu_name() -> str:
    """The processor as it calls itself."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_quota() -> float | None:
    """Cores that the control group allows, where it limits them."""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if not limit.exists():
        return None
    quota, period = limit.read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def free_memory() -> tuple[int | None, int | None]:
    """Free and total bytes of main memory, within the control group's limit."""
    info = Path("/proc/meminfo")
    if not info.exists():
        return None, None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        most = int(limit.read_text())
        free, total = min(free, most - int(used.read_text())), min(total, most)
    return free, total
