"""Break each kernel on purpose and see the named test fail. A patch's first line says which test must catch it.

After a change to a kernel, a patch may no longer apply: rewrite it against the new code, keeping what it breaks.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PATCHES = sorted(Path(__file__).parent.glob("*.patch"))
KERNELS = {"logps_forward", "logps_backward", "pair", "ranking", "fused", "fused_backward", "fold", "tile_gradient"}
HEADS = {"lora", "sharded"}
"""Of the LM head: with LoRA factors, and with its vocabulary over several ranks."""


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes that have imported what takes seconds, and nothing of the package."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "triton", "transformers.modeling_utils", "hypothesis", "pytest"])
    return context


def _pytest(words: list[str], kernels: Path, output: Path) -> None:
    status = int(pytest.ExitCode.INTERNAL_ERROR)  # unless pytest comes to its end
    try:
        with output.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(ROOT)
        sys.path.insert(0, str(kernels))
        os.environ["PYTHONPATH"] = str(kernels)  # for the processes that the tests start
        torch.set_num_threads(1)
        if "dpo_kernels" not in sys.modules:
            status = int(pytest.main(words))
    finally:
        sys.stdout.flush()
        os._exit(status)


def run(server: Any, tests: str, kernels: Path) -> tuple[int, str]:
    """Exit status and output of the named tests against another copy of the package."""
    files, _, expression = tests.partition(" -k ")
    words = ["-q", "-x", "-p", "no:cacheprovider", *files.split(), "-k", expression, "-o", f"pythonpath={kernels} ."]
    output = kernels / "output.txt"
    process = server.Process(target=_pytest, args=(words, kernels, output))
    process.start()
    process.join()
    return process.exitcode, output.read_text()


def copy_package(folder: Path) -> Path:
    shutil.copytree(ROOT / "kernels" / "dpo_kernels", folder / "kernels" / "dpo_kernels")
    return folder / "kernels"


def test_every_kernel_is_broken_in_three_ways():
    for kernel in KERNELS | HEADS:
        assert sum(patch.name.startswith(kernel) for patch in PATCHES) >= 3, kernel


@pytest.mark.slow
def test_the_copy_without_a_patch_passes(server, tmp_path):
    status, output = run(server, "tests/triton/test_logits.py -k test_value_and_gradient", copy_package(tmp_path))
    assert status == 0, output[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.stem)
def test_mutation_is_caught(server, patch, tmp_path):
    kernels = copy_package(tmp_path)
    applied = subprocess.run(["git", "apply", patch], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert applied.returncode == 0, applied.stderr
    tests = patch.read_text().splitlines()[0].removeprefix("Caught by: ")
    status, output = run(server, tests, kernels)
    # A failed test, or a crash on memory that is not ours; 0 passed, 2 to 5 ran nothing.
    assert status not in (0, 2, 3, 4, 5), f"{patch.stem} got past {tests}:\n{output[-2000:]}"
