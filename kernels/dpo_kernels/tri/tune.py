"""Launch parameters by measurement, where `DPO_KERNELS_AUTOTUNE=1` asks for it: off by default.

Without it `rows.launch_for` decides, a fixed rule. With it a few launches about that rule's are timed, once for every
(streaming kernel, dtype, V, device), on scratch rows; the fastest is kept for the process. It synchronises, so inside a
graph capture the rule decides, and so it does for the one-launch loss, whose finisher fixes its threads. A row's sums
are added in another order under another launch: last bits may differ from one tuning to the next.
"""

import os
from collections.abc import Callable
from contextlib import contextmanager
from typing import Literal

import torch
import triton.testing

from ..common import LogitOptions
from . import rows as _rows
from .rows import Launch

Kernel = Literal["forward", "backward", "fold", "gradient"]
SCRATCH_BYTES = 64 << 20
"""Of logits a trial reads: more than a GPU's L2 holds."""
_chosen: dict[tuple[Kernel, torch.dtype, int, torch.device], Launch] = {}
_trial: Launch | None = None


def enabled() -> bool:
    return os.environ.get("DPO_KERNELS_AUTOTUNE", "0") not in ("", "0")


def candidates(rule: Launch) -> list[Launch]:
    """The rule's launch first, then half and twice its threads, each with half its words in flight too."""
    threads_of_a_warp = rule.lanes // rule.warps
    found = [rule]
    for lanes in (rule.lanes, rule.lanes // 2, rule.lanes * 2):
        for unroll in (rule.unroll, rule.unroll // 2):
            launch = Launch(rule.vec, lanes, unroll, lanes // threads_of_a_warp)
            if threads_of_a_warp <= lanes <= 512 and unroll >= 1 and launch not in found:
                found.append(launch)
    return found


def launch_for(kernel: Kernel, dtype: torch.dtype, vocabulary: int, device: torch.device) -> Launch:
    """The launch of a streaming kernel: the rule's, or the fastest of `candidates` where tuning is on."""
    if _trial is not None:
        return _trial
    rule = _rows.launch_for(dtype, vocabulary, device)
    if not enabled():
        return rule
    key = kernel, dtype, vocabulary, device
    if key not in _chosen:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return rule
        work = _work(kernel, dtype, vocabulary, device)
        _chosen[key] = min(candidates(rule), key=lambda launch: _timed(work, launch))
    return _chosen[key]


@contextmanager
def _forced(launch: Launch):
    global _trial
    _trial = launch
    try:
        yield
    finally:
        _trial = None


def _timed(work: Callable[[], object], launch: Launch) -> float:
    with _forced(launch):
        return seconds(work)


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the least of many."""
    found = triton.testing.do_bench(work, warmup=5, rep=20, return_mode="min")
    assert isinstance(found, float)
    return found


def _work(kernel: Kernel, dtype: torch.dtype, vocabulary: int, device: torch.device) -> Callable[[], object]:
    """A launch of the kernel on scratch rows."""
    from . import logits, tiles

    count = max(1, SCRATCH_BYTES // (vocabulary * dtype.itemsize))
    rows = torch.zeros(count, -(-vocabulary // 16) * 16, dtype=dtype, device=device)[:, :vocabulary]
    targets, ones = torch.zeros(count, dtype=torch.int64, device=device), torch.ones(count, device=device)
    options = LogitOptions()
    if kernel == "forward":
        return lambda: logits.logps_forward(rows, targets, options)
    if kernel == "backward":
        return lambda: logits.logps_backward(rows, targets, ones, ones, ones, options, in_place=True)
    tile = rows if dtype == torch.float32 else torch.zeros(rows.shape, device=device)
    state = tiles.TileState.start(targets, options)
    if kernel == "fold":
        return lambda: tiles.fold_tile(tile, state, 0, 0)
    return lambda: tiles.tile_gradient(tile, rows, state, 0, ones, ones)
