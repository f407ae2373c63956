"""What one call allocates."""

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


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
