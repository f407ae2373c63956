"""`make demo` and `make test` on a fresh machine: which Python they take, and what a second call does."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKE = shutil.which("make")
STAMPS = ("bin/python", ".base", ".dev")

pytestmark = pytest.mark.skipif(MAKE is None, reason="needs make")


def make(target: str, venv: Path, path: Path | None = None, **options: str) -> subprocess.CompletedProcess[str]:
    """What make would run for a target, with no other programs than those in `path`."""
    words = [str(MAKE), "--dry-run", target, f"VENV={venv}", *(f"{name}={value}" for name, value in options.items())]
    names = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "PYTHON"}
    return subprocess.run(
        words, cwd=ROOT, env=names | ({"PATH": str(path)} if path else {}), capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("names", [("python3.11", "python3"), ("python3.12",), ("python3.13", "python3"), ("python3",)])
def test_the_oldest_python_that_is_there_makes_the_environment(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    found = make("demo", tmp_path / "venv", tmp_path)
    assert f"{tmp_path / names[0]} -m venv {tmp_path / 'venv'}" in found.stdout


def test_no_python_is_one_line_and_another_one_can_be_named(tmp_path):
    found = make("demo", tmp_path / "venv", tmp_path)
    assert found.returncode == 2
    assert "expected Python >= 3.11 on the PATH, found none" in found.stderr
    assert "/opt/python" in make("demo", tmp_path / "venv", tmp_path, PYTHON="/opt/python").stdout


def test_a_second_call_installs_nothing_until_what_is_needed_changes(tmp_path):
    for name in STAMPS:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for target in ("demo", "test", "test-slow", "lint"):
        assert " -m " in (fresh := make(target, tmp_path / "venv").stdout), target
        assert "pip install" in fresh, target
        assert "pip" not in make(target, tmp_path).stdout, target
    sources = max((ROOT / name).stat().st_mtime for name in ("pyproject.toml", "setup.py", "constraints.txt"))
    for name in STAMPS:
        os.utime(tmp_path / name, (sources - 10, sources - 10))
    for target in ("demo", "test"):
        assert "pip install" in make(target, tmp_path).stdout, target
