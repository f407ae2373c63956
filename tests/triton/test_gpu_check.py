"""The GPU report: its whole code path at tiny sizes under the interpreter, and for real wherever CUDA is found."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dpo_kernels import plans

from bench import gpu_check, gpu_checks
from tests.harness.interpret import interpret

ROOT = Path(__file__).resolve().parents[2]
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def poisoned_allocations():
    """Not here: the script measures, and compares with torch's own."""


def test_the_script_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "GPU_TILE", (8, 8 * 96))
    with interpret():
        assert gpu_check.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "gpu.json")]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == []
    assert all(check["ok"] for check in report["checks"])
    assert {"ours", "ours, to the loss", "eager"} <= set(report["logits"][0]["sides"])
    assert {"ours retain", "ours recompute", "eager"} <= set(report["head"][0]["sides"])


def test_no_speed_behind_a_red_check(tmp_path, monkeypatch):
    broken = [gpu_checks.Check("made to fail", 1.0, 0.5)]
    monkeypatch.setattr(gpu_check, "run_checks", lambda sizes, device: broken)
    assert gpu_check.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "gpu.json")]) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report["failed"] == ["made to fail"]
    assert "logits" not in report


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_no_gpu_is_one_line_and_status_two(tmp_path, capsys):
    assert gpu_check.main(["--output", str(tmp_path / "gpu.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "gpu.json").exists()


@pytest.mark.gpu
@needs_cuda
def test_compiled_kernels():
    """The compiled twins of the interpreted tests: accuracy at every vocabulary, repeats, no syncs, graph replay."""
    failed = [check for check in gpu_checks.run_checks(gpu_checks.FULL, "cuda") if not check.ok]
    assert not failed


@pytest.mark.gpu
@needs_cuda
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="no compute-sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer(tool, tmp_path):
    script = ["-m", "bench.gpu_check", "--quick", "--output", str(tmp_path / "gpu.json")]
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
