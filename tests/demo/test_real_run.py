"""The documented run on a real model, from the command line. Needs a package index (pip) and the extra `gguf`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.real_run import __doc__ as documented
from bench.real_run import train_flags
from dpo.metrics import read_json_lines

ROOT = Path(__file__).parents[2]


def test_the_documented_command_is_the_one_that_runs():
    flags = " ".join(train_flags(Path(".cache/fused-dpo"), Path("runs/smollm2-vader")))
    assert documented is not None
    assert flags in " ".join(documented.replace("'", "").split())


@pytest.mark.slow
def test_smollm2_learns_rated_preferences(tmp_path):
    command = [sys.executable, "-m", "bench.real_run", "--output", str(tmp_path / "run")]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    first, *_, last = read_json_lines(tmp_path / "run" / "eval.jsonl")
    assert first["accuracy"] == 0.5
    assert last["accuracy"] >= 0.80
    processor_seconds = re.search(r"(\d+) s of processor time", finished.stdout)
    assert processor_seconds is not None
    assert int(processor_seconds[1]) < 2 * 240, "more than four minutes of two cores"
