"""Memory of this process as the kernel counts it.

`ru_maxrss` is not used on Linux: a child inherits its parent's maximum through exec, so a small process started by a
large one would report the parent's size. `VmHWM` belongs to the process's own address space.
"""

from __future__ import annotations

import sys
from pathlib import Path

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
    import resource

    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else maximum * 1024


def resident_bytes() -> int:
    """Resident set of this process now, in bytes (the peak where the system does not say)."""
    current = _field("VmRSS")
    return peak_bytes() if current is None else current
