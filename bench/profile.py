"""Where a step's time goes: torch's profiler, its operators grouped into components.

Self times: what an operator spends itself, not in the operators it calls, so components add up to the step.
"""

import time
from collections.abc import Sequence
from typing import Any

from torch.profiler import ProfilerActivity, profile

from bench.workload import Pair

COMPONENTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention kernel", ("scaled_dot_product",)),
    ("matrix products", ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "linear_pointwise")),
    ("optimizer update", ("_fused_adam", "_fused_rmsprop", "aten::addcdiv", "aten::_foreach", "Optimizer")),
    ("gradient norm", ("linalg_vector_norm", "aten::norm", "clip_grad")),
    ("activation (SiLU)", ("silu", "sigmoid")),
    ("softmax and exponentials", ("softmax", "aten::exp", "aten::amax", "logsumexp", "aten::log", "aten::maximum")),
    ("copies, casts, concatenation", ("copy_", "aten::cat", "aten::clone", "aten::to", "contiguous", "aten::stack")),
    ("fills", ("aten::fill_", "aten::zero_", "aten::zeros", "aten::full")),
    ("gather and scatter", ("embedding", "index", "gather", "scatter", "aten::where")),
    ("elementwise and reductions", ("aten::mul", "aten::add", "aten::sub", "aten::div", "aten::neg", "aten::sum")),
)
NORM = ("aten::rsqrt", "aten::pow", "aten::mean", "rms_norm")
OTHER = "everything else (autograd, dispatch, packing, Python)"


def component_of(operator: str) -> str:
    """The component that an operator's self time belongs to."""
    if any(part in operator for part in NORM):
        return "norm statistics"
    for component, parts in COMPONENTS:
        if any(part in operator for part in parts):
            return component
    return OTHER


def profile_step(side: Any, pairs: Sequence[Pair], top: int = 24) -> dict[str, Any]:
    """One step under the profiler: seconds by component, and the operators with the largest self times."""
    side.step(pairs)
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as records:
        side.step(pairs)
    seconds = time.perf_counter() - start
    events = [e for e in records.key_averages() if e.self_cpu_time_total > 0]
    components: dict[str, float] = {}
    for event in events:
        component = component_of(event.key)
        components[component] = components.get(component, 0.0) + event.self_cpu_time_total / 1e6
    # time outside any operator: Python between them
    components[OTHER] = components.get(OTHER, 0.0) + max(0.0, seconds - sum(components.values()))
    events.sort(key=lambda event: -event.self_cpu_time_total)
    operators = [{"operator": e.key, "calls": e.count, "seconds": e.self_cpu_time_total / 1e6} for e in events[:top]]
    return {"seconds": seconds, "components": components, "operators": operators}
