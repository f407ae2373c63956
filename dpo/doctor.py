"""`dpo doctor`: what is installed, what would run where and why, whether the kernels are right, and what to change."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from dpo_kernels.backends import resolve_backend, triton_problem
from dpo_kernels.products import onednn_is_faster
from packaging.requirements import Requirement

from dpo.commands import DoctorConfig
from dpo.console import console, say
from dpo.errors import UserError
from dpo.inputs import resolve_device
from dpo.machine import GIB, cpu_quota, describe_cpu, describe_gpu, free_memory, version, versions
from dpo.selftest import Check, check_kernels
from dpo.varlen import default_varlen

EXTRAS = {
    "flash-attn": "variable-length attention with soft-capping and windows on CUDA",
    "peft": "LoRA",
    "bitsandbytes": "4-bit bases on CUDA",
    "gguf": "GGUF checkpoints",
    "accelerate": "GGUF checkpoints",
    "tensorboard": "curves while a run goes (--log-to tensorboard)",
    "wandb": "--log-to wandb",
    "trackio": "--log-to trackio",
}
SELF_TEST_SECONDS = 5.0


def doctor(config: DoctorConfig) -> dict[str, Any]:
    """Examines this machine and prints what it found, as tables or as one JSON object.

    Returns:
        `ok`, `versions`, `extras`, `devices`, `backends`, `self_test`, `problems` (what makes a run fail or go wrong:
        `ok` is their absence) and `advice` (what would make it better).
    Raises:
        UserError: --device or --model names nothing that is there.
    """
    device = resolve_device(config.device)
    problems: list[str] = []
    advice: list[str] = []
    report: dict[str, Any] = {
        "ok": True,
        "versions": _versions(problems),
        "extras": {name: version(name) for name in EXTRAS},
        "devices": [_cpu(advice), *(_gpu(k, advice) for k in range(torch.cuda.device_count()))],
        "backends": backends(device, advice),
    }
    if config.model:
        report["model"] = _model(config, advice)
    report["self_test"] = _self_test(device, problems)
    if report["extras"]["tensorboard"] is None:
        advice.append("tensorboard is not installed: curves come with the end of a run only (pip install tensorboard)")
    report |= {"problems": problems, "advice": advice, "ok": not problems}
    if config.json:
        print(json.dumps(report, indent=2))
    else:
        _show(report)
    return report


def _versions(problems: list[str]) -> dict[str, str | None]:
    """Installed versions; a required package that is missing or out of range is a problem."""
    required = [Requirement(text) for text in _requirements()]
    for need in required:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found = version(need.name)
        if found is None or not need.specifier.contains(found, prereleases=True):
            problems.append(f"{need.name}: expected {need.specifier or 'it installed'}, found {found or 'none'}")
    return versions()


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("fused-dpo") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return []


def _cpu(advice: list[str]) -> dict[str, Any]:
    found = describe_cpu()
    threads, free = found["threads"], found["memory_free_bytes"]
    usable = min(float(found["cores"]), cpu_quota() or float("inf"))
    if threads > usable:
        advice.append(f"{threads} threads on {usable:g} usable cores slow each other down: set OMP_NUM_THREADS")
    elif threads < int(usable) // 2:
        advice.append(f"{threads} threads leave most of {usable:g} usable cores idle: see OMP_NUM_THREADS")
    if free is not None and free < 2 * GIB:
        advice.append(f"{free / GIB:.1f} GiB of memory are free: training needs about 16 bytes a parameter and more")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > 1.5 * usable:
        advice.append(f"other programs keep the cores busy (load {load:.1f} on {usable:g}): timings will mislead")
    return found | {"disk_free_bytes": shutil.disk_usage(Path.cwd()).free}


def _gpu(index: int, advice: list[str]) -> dict[str, Any]:
    found = describe_gpu(index)
    free, total = found["memory_free_bytes"], found["memory_total_bytes"]
    if free < 0.5 * total:
        amount = f"{free / GIB:.1f} of {total / GIB:.1f} GiB"
        advice.append(f"cuda:{index}: {amount} are free: another process holds the rest")
    if not found["bf16"]:
        advice.append(f"cuda:{index}: compute capability {found['capability']} has no fast bf16")
    return found


def backends(device: torch.device, advice: list[str]) -> list[dict[str, str]]:
    """What computes attention, kernels and products on `device`, by the functions that training asks."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for softcap in (None, 50.0):
            uses, why = attention_choice(device.type, dtype, softcap)
            capped = " with soft-capping" if softcap else ""
            rows.append({"what": f"attention{capped}, {_label(dtype)}", "uses": uses, "why": why})
    for dtype in (torch.float32, torch.bfloat16):
        uses = resolve_backend(None, device, dtype)
        problem = triton_problem(device.type, (dtype,))
        asked = os.environ.get("DPO_KERNELS_BACKEND")
        why = f"DPO_KERNELS_BACKEND={asked}" if asked else "compiled for the device" if uses == "triton" else ""
        rows.append(
            {"what": f"loss kernels, {_label(dtype)}", "uses": uses, "why": why or f"triton {problem or 'can run too'}"}
        )
    if device.type == "cpu":
        fast = onednn_is_faster()
        why = "torch would take MKL, slower on AMD" if fast else "the faster here, or asked for"
        rows.append({"what": "fp32 matrix products", "uses": "oneDNN" if fast else "torch's own", "why": why})
    elif rows[0]["uses"] == "eager":
        advice.append("fp32 on CUDA takes plain attention: --dtype bf16 takes the variable-length kernels")
    return rows


def attention_choice(device_type: str, dtype: torch.dtype, softcap: float | None) -> tuple[str, str]:
    """The attention of a packed row in this arithmetic, and why it is that one."""
    if device_type == "cpu":
        if softcap is not None:
            return "eager", "one plain call a segment: the fused CPU kernel has no soft-capping"
        return "flash", "torch's fused CPU kernel, one call a segment, in fp32"
    if dtype == torch.float32:
        return "eager", "one plain call a segment: the variable-length kernels have no fp32"
    try:
        name = getattr(default_varlen(softcap), "__name__", "custom").removesuffix("_varlen")
        return name + " varlen", "one call a row"
    except UserError as error:
        return "none", str(error)


def _label(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "bf16"


def _model(config: DoctorConfig, advice: list[str]) -> dict[str, Any]:
    """Whether the model's layers can be packed, without loading its weights."""
    from transformers import AutoModelForCausalLM

    from dpo.load import load_config
    from dpo.support import refuse_unsupported

    settings = load_config(str(config.model), trust_remote_code=config.trust_remote_code)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=config.trust_remote_code)
    parameters = sum(p.numel() for p in model.parameters())
    try:
        refuse_unsupported(model, "shared")
        layout = "shared"
    except UserError as error:
        layout = "padded"
        advice.append(str(error))
    free = free_memory()[0] if resolve_device(config.device).type == "cpu" else torch.cuda.mem_get_info()[0]
    needs = 12 * parameters  # fp32 weights, gradients, and one state of RMSprop
    if free is not None and needs > free:
        advice.append(
            f"{config.model}: weights, gradients and RMSprop's state take {needs / GIB:.1f} GiB in fp32, "
            f"{free / GIB:.1f} are free"
        )
    return {"name": type(model).__name__, "parameters": parameters, "layout": layout, "training_bytes": needs}


def _self_test(device: torch.device, problems: list[str]) -> dict[str, Any]:
    """The kernels on torch, and on Triton: compiled on CUDA, else in its interpreter, in a process of its own."""
    start = time.perf_counter()
    runs: dict[str, list[Check] | str] = {"torch, cpu": _guarded(lambda: check_kernels("torch", "cpu"))}
    if device.type == "cuda":
        runs["torch, cuda"] = _guarded(lambda: check_kernels("torch", "cuda"))
        runs["triton compiled, cuda"] = _guarded(lambda: check_kernels("triton", "cuda"))
    elif importlib.util.find_spec("triton") is None:
        runs["triton"] = "not run: triton is not installed"
    else:
        runs["triton interpreted, cpu"] = _guarded(lambda: _interpreted(start))
    runs["packed forward, " + device.type] = _guarded(lambda: [_forward(device)])
    checks = []
    for where, found in runs.items():
        if isinstance(found, str):
            checks.append({"where": where, "ok": None, "found": found})
            if not found.startswith("not run"):
                problems.append(f"self-test, {where}: {found}")
            continue
        for check in found:
            checks.append({"where": where, **dataclasses.asdict(check), "ok": check.ok})
            if not check.ok:
                problems.append(
                    f"self-test, {where}: {check.name} is {check.error:.1e} from float64, more than {check.allowed:.1e}"
                )
    return {"seconds": round(time.perf_counter() - start, 2), "checks": checks}


def _guarded(run: Any) -> list[Check] | str:
    """A self-test that raises is a finding, not a crash."""
    try:
        return run()
    except Exception as error:  # whatever a driver, compiler or kernel may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _interpreted(start: float) -> list[Check] | str:
    """Triton's kernels in its own interpreter, which must be chosen before the first import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    # starting Python and torch counts too, and may take long on a machine that is busy: several times the test's share
    limit = max(30.0, SELF_TEST_SECONDS * 6 - (time.perf_counter() - start))
    command = [sys.executable, "-m", "dpo.selftest", "triton", "cpu"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return f"not run: the interpreter took more than {limit:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
    return [Check(**record) for record in json.loads(done.stdout)]


def _forward(device: torch.device) -> Check:
    """A tiny random model: the packed, prompt-sharing forward against plain forwards."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo.checks import check_sharing
    from dpo.packing import Group

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model.to(device)
    groups = [Group([1, 2, 3, 4], [[5, 6], [7], [8, 9, 10]], ()), Group([11, 12], [[13], [14, 15]], ())]
    found = check_sharing(model, groups)
    return Check("packed against plain", found.max_abs_error, found.tolerance)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    def table(title: str, columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> None:
        out = Table(*columns, title=title, title_justify="left")
        for row in rows:
            out.add_row(*(str(cell) for cell in row))
        console.print(out)

    installed = [(name, found or "-", "") for name, found in report["versions"].items()]
    extras = [(name, found or "-", EXTRAS[name]) for name, found in report["extras"].items()]
    table("versions", ("package", "installed", "for"), installed + extras)
    table("devices", ("device", "name", "capability", "free", "of"), [_device_row(d) for d in report["devices"]])
    choices = [(row["what"], row["uses"], row["why"]) for row in report["backends"]]
    table("what would run", ("what", "uses", "because"), choices)
    if model := report.get("model"):
        gib = model["training_bytes"] / GIB
        say(f"{model['name']}: {model['parameters']:,} parameters, {gib:.1f} GiB in training, layout {model['layout']}")
    groups: dict[str, list[dict[str, Any]]] = {}
    for check in report["self_test"]["checks"]:
        groups.setdefault(check["where"], []).append(check)
    rows = [(where, *_verdict(checks)) for where, checks in groups.items()]
    table(f"self-test against float64, {report['self_test']['seconds']} s", ("where", "passed", "worst"), rows)
    for line in report["problems"]:
        console.print(f"problem: {line}", style="red", markup=False)
    for line in report["advice"]:
        console.print(f"advice: {line}", style="yellow", markup=False)
    say("ready" if report["ok"] else "not ready: see the problems above")


def _device_row(device: dict[str, Any]) -> tuple[str, ...]:
    free, total = device["memory_free_bytes"], device["memory_total_bytes"]
    name = device["name"] + (f", {device['threads']} threads on {device['cores']} cores" if "cores" in device else "")
    sizes = ("-", "-") if free is None else (f"{free / GIB:.1f} GiB", f"{total / GIB:.1f} GiB")
    return device["device"], name, device["capability"], *sizes


def _verdict(checks: list[dict[str, Any]]) -> tuple[str, str]:
    if "found" in checks[0]:
        return "-", checks[0]["found"]
    worst = max(checks, key=lambda check: check["error"] / check["allowed"])
    share = worst["error"] / worst["allowed"]
    return f"{sum(c['ok'] for c in checks)} of {len(checks)}", f"{worst['name']}: {share:.0%} of the allowed error"
