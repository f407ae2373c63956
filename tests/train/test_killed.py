"""Processes that are killed: the run goes on as if nothing had been, and nothing of them stays behind.

The trainer is forked from a server that has imported everything and used no threads.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import dpo.train
from dpo.cli import main
from tests.train.runs import result, same, words, write_small


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def processes() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.train.test_killed", "dpo.train"])
    return context


def _main(words: list[str]) -> None:
    torch.set_num_threads(1)
    main(words)


def _run(processes, words: list[str]) -> int:
    process = processes.Process(target=_main, args=(words,))
    process.start()
    process.join()
    return process.exitcode


def _wait_for(process, run: Path, steps: int) -> None:
    """Until the run has logged so many steps (0: until it has its folder)."""
    wanted, deadline = run / "metrics.jsonl" if steps else run, time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if wanted.exists() and (not steps or wanted.read_bytes().count(b"\n") >= steps):
            return
        time.sleep(0.005)


def _state_and_parent(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]


def _descendants(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # ended meanwhile
            if _state_and_parent(int(folder.name))[1] == str(pid):
                found += [int(folder.name), *_descendants(int(folder.name))]
    return found


def _ends(pid: int, seconds: float = 30) -> bool:
    """Whether a process is gone in time (or is dead, and nobody has asked for its status)."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if _state_and_parent(pid)[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


_WORKS = """
import multiprocessing, sys, time
from dpo.workers import end_with_parent
def work():
    end_with_parent(0)
    time.sleep(600)
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    print(*(worker.pid for worker in workers), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_the_workers_of_a_killed_process_end(tmp_path, method):
    script = tmp_path / "works.py"
    script.write_text(_WORKS)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(dpo.train.__file__).parents[1]), *sys.path])}
    with subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        servers = _descendants(process.pid)
        time.sleep(0.5)  # the workers have begun to wait
        assert not any(_ends(pid, 0.1) for pid in workers)
        process.kill()
    assert len(workers) == 2
    assert all(map(_ends, {*workers, *servers}))


@pytest.mark.slow
def test_sigkill_at_random_moments_costs_nothing(toy, tmp_path, processes):
    flags = "--max-steps", "12", "--data-workers", "1"
    assert _run(processes, words(toy, tmp_path / "whole", *flags)) == 0
    draw, whole = random.Random(1), result(tmp_path / "whole")
    for k, steps in enumerate(draw.sample(range(9), 5)):
        run = tmp_path / str(k) / "run"
        process = processes.Process(target=_main, args=(words(toy, run, *flags),))
        process.start()
        _wait_for(process, run, steps)
        time.sleep(draw.uniform(0, 0.05))
        workers = _descendants(process.pid)
        process.kill()
        process.join()
        assert all(map(_ends, workers)), "orphans"
        assert process.exitcode == -signal.SIGKILL, (steps, "the run ended before it was killed")
        assert _run(processes, words(toy, run, *flags, "--resume", "auto")) == 0
        assert same(result(run), whole), steps
        assert yaml.safe_load((run / "config.yaml").read_text())["resume"] == "auto"
