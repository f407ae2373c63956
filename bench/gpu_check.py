"""Everything the first person with a GPU needs, in one JSON: correctness, speed, bandwidth and GEMM shares,
environment.

    make gpu-check                                       # writes bench/results/gpu.json
    python -m bench.gpu_check --output gpu.json [--quick]

Speed is reported only behind green checks. N rows, V vocabulary, H hidden; times are medians in seconds.
"""

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from dpo_kernels import dpo_loss_from_logits, linear_token_logps, token_logps
from torch import Tensor

from bench.gpu_checks import FULL, TINY, run_checks

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def environment(device: str) -> dict:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = {"platform": platform.platform(), "python": platform.python_version(), "versions": versions}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "rocm": torch.version.hip,
        }
    return found


def measure(function: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds. On a GPU the L2 cache is overwritten before every repeat and the kernel's own time is taken."""
    function()
    times = []
    if device != "cuda":
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
        return median(times)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for _ in range(repeats):
        flush.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return median(times)


def copy_bandwidth(device: str, elements: int, repeats: int) -> float:
    """Bytes a second read and written by a plain copy."""
    source = torch.zeros(elements, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * elements / measure(lambda: target.copy_(source), device, repeats)


def gemm_rate(device: str, size: int, repeats: int) -> float:
    """Operations a second of a bf16 product of squares."""
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    return 2 * size**3 / measure(lambda: a @ b, device, repeats)


def eager_logps(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def logits_sides(compile_peer: bool, rows: int, device: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Log-probs from logits, ours also to the loss of four pairs: ours and whoever is installed."""
    completion_ids, index = torch.arange(rows, device=device) * 8 // rows, torch.arange(8, device=device).view(2, 4)

    def to_the_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return dpo_loss_from_logits(logits, targets, completion_ids, None, *index, num_completions=8).loss

    sides: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"ours": token_logps, "eager": eager_logps}
    sides["ours, to the loss"] = to_the_loss
    if compile_peer:
        sides["torch.compile"] = torch.compile(eager_logps)
    try:
        from trl.trainer.utils import selective_log_softmax  # pyright: ignore[reportMissingImports]

        sides["trl"] = selective_log_softmax
    except ImportError:
        pass
    return sides


def head_sides(quick: bool) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Sum of log-probs through the LM head: ours by plan and whoever is installed."""
    sides: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        f"ours {plan}": lambda h, w, t, p=plan: linear_token_logps(h, w, t, plan=p).sum()
        for plan in ("retain", "recompute")
    }
    sides["eager"] = lambda h, w, t: eager_logps(h @ w.T, t).sum()
    if quick:
        return sides
    sides["torch.compile"] = torch.compile(lambda h, w, t: eager_logps(h @ w.T, t).sum())
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        sides["cut-cross-entropy"] = lambda h, w, t: -linear_cross_entropy(h, w, t, reduction="sum")
    except ImportError:
        pass
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

        sides["liger"] = lambda h, w, t: -LigerFusedLinearCrossEntropyLoss(reduction="sum")(w, h, t)
    except ImportError:
        pass
    return sides


def forward_backward(function: Callable[..., Tensor], leaves: tuple[Tensor, ...], *rest: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    function(*leaves, *rest).sum().backward()


def peak_bytes(function: Callable[[], object], device: str) -> int | None:
    if device != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def logits_speed(device: str, rows: int, vocabulary: int, repeats: int, bandwidth: float, compiled: bool) -> dict:
    """Seconds and bandwidth, forward and forward with backward, bf16."""
    logits = torch.randn(rows, vocabulary, device=device).to(torch.bfloat16).requires_grad_()
    targets = torch.randint(0, vocabulary, (rows,), device=device)
    size, found = rows * vocabulary * 2, {}
    for name, function in logits_sides(compiled, rows, device).items():
        with torch.no_grad():
            forward = measure(lambda f=function: f(logits, targets), device, repeats)
        both = measure(lambda f=function: forward_backward(f, (logits,), targets), device, repeats)
        found[name] = {
            "forward_seconds": forward,
            "forward_backward_seconds": both,
            "forward_bytes_per_second": size / forward,
            "forward_share_of_copy": size / forward / bandwidth,
            "forward_backward_share_of_copy": 3 * size / both / bandwidth,
            "peak_bytes": peak_bytes(lambda f=function: forward_backward(f, (logits,), targets), device),
        }
    return {"rows": rows, "vocabulary": vocabulary, "dtype": "bfloat16", "bytes_one_read": size, "sides": found}


def head_speed(device: str, shape: tuple[int, int, int], repeats: int, rate: float, quick: bool) -> dict:
    """Seconds and GEMM shares of the LM head, forward with backward, bf16."""
    rows, width, vocabulary = shape
    hidden = torch.randn(rows, width, device=device).to(torch.bfloat16).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * 0.02).to(torch.bfloat16).requires_grad_()
    targets, found = torch.randint(0, vocabulary, (rows,), device=device), {}
    for name, function in head_sides(quick).items():
        seconds = measure(lambda f=function: forward_backward(f, (hidden, weight), targets), device, repeats)
        # Three products are the least: logits, dH, dW.
        least = 3 * 2 * rows * width * vocabulary
        found[name] = {
            "forward_backward_seconds": seconds,
            "useful_operations_per_second": least / seconds,
            "share_of_gemm_rate": least / seconds / rate,
            "peak_bytes": peak_bytes(lambda f=function: forward_backward(f, (hidden, weight), targets), device),
        }
    return {"rows": rows, "hidden": width, "vocabulary": vocabulary, "dtype": "bfloat16", "sides": found}


def run(device: str, quick: bool) -> dict:
    """The whole report; speed only where every check is green."""
    checks = run_checks(TINY if quick else FULL, device)
    failed = [check.name for check in checks if not check.ok]
    report: dict = {"environment": environment(device), "checks": [asdict(c) | {"ok": c.ok} for c in checks]}
    report["failed"] = failed
    if failed:
        return report
    repeats = 1 if quick else 20
    bandwidth = copy_bandwidth(device, 1 << 10 if quick else 1 << 28, repeats)
    rate = gemm_rate(device, 32 if quick else 8192, repeats)
    report |= {"copy_bytes_per_second": bandwidth, "gemm_operations_per_second": rate}
    logits = [(4, 130)] if quick else [(4096, 32000), (4096, 128256), (4096, 151936)]
    heads = [(4, 16, 70)] if quick else [(8192, 4096, v) for v in (32000, 128256, 151936)]
    report["logits"] = [logits_speed(device, *shape, repeats, bandwidth, not quick) for shape in logits]
    report["head"] = [head_speed(device, shape, repeats, rate, quick) for shape in heads]
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the JSON to write")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the script itself")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu needs an interpreter")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device: expected a CUDA device, found none; nothing was measured", file=sys.stderr)
        return 2
    report = run(options.device, options.quick)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{len(report['checks']) - len(report['failed'])} of {len(report['checks'])} checks passed; {options.output}")
    for name in report["failed"]:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
