"""Memory of this process as the kernel counts it, and what one call allocates.

`ru_maxrss` is not used on Linux: a child inherits its parent's maximum through exec, so a small side started by a large
process would report the parent's size. `VmHWM` belongs to the process's own address space.
"""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

STATUS = Path("/proc/self/status")


def _field(name: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = [line for line in STATUS.read_text().splitlines() if line.startswith(name + ":")]
    return int(lines[0].split()[1]) * 1024 if lines else None


def peak_bytes() -> int:
    """Largest resident set of this process so far, in bytes."""
    peak = _field("VmHWM")
    if peak is not None:
        return peak
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def resident_bytes() -> int:
    """Resident set of this process now, in bytes (the peak where the system does not say)."""
    current = _field("VmRSS")
    return peak_bytes() if current is None else current


def allocated_peak(work: Callable[[], Any]) -> int:
    """Most bytes that `work` holds on the CPU at once, above what was there, by torch's profiler; results included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = work()
    results: Any = record.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return peak
