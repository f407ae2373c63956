"""Break each kernel on purpose and see the named test fail. A patch's first line says which test must catch it.

After a change to a kernel, a patch may no longer apply: rewrite it against the new code, keeping what it breaks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted(Path(__file__).parent.glob("*.patch"))
KERNELS = {"logps_forward", "logps_backward", "pair", "ranking", "fused", "fused_backward", "fold", "tile_gradient"}
HEADS = {"lora", "sharded"}
"""Of the LM head: with LoRA factors, and with its vocabulary over several ranks."""


def run(tests: str, kernels: Path) -> subprocess.CompletedProcess:
    """The named tests against another copy of the package."""
    files, _, expression = tests.partition(" -k ")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files.split()]
    command += ["-k", expression, "-o", f"pythonpath={kernels} ."]
    environment = {**os.environ, "PYTHONPATH": str(kernels), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def copy_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "kernels" / "dpo_kernels", folder / "kernels" / "dpo_kernels")
    return folder / "kernels"


def test_every_kernel_is_broken_in_three_ways():
    for kernel in KERNELS | HEADS:
        assert sum(patch.name.startswith(kernel) for patch in PATCHES) >= 3, kernel


@pytest.mark.slow
def test_the_copy_without_a_patch_passes(tmp_path):
    result = run("tests/triton/test_logits.py -k test_value_and_gradient", copy_package(tmp_path))
    assert result.returncode == 0, result.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_mutation_is_caught(patch, tmp_path):
    kernels = copy_package(tmp_path)
    applied = subprocess.run(["git", "apply", patch], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stderr
    tests = patch.read_text().splitlines()[0].removeprefix("Caught by: ")
    result = run(tests, kernels)
    # A failed test, or a crash on memory that is not ours; 0 passed, 2 to 5 ran nothing.
    assert result.returncode not in (0, 2, 3, 4, 5), f"{patch.stem} got past {tests}:\n{result.stdout[-2000:]}"
