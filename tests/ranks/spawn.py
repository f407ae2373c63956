"""Starts a run's processes as torchrun does, on a free port, one thread each."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | threads | offline | {"PYTHONPATH": os.pathsep.join(filter(None, paths))} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(ranks: int, words: Sequence[str], **more: str) -> list[subprocess.Popen[str]]:
    """`python WORDS` on every rank of one machine; `more` goes into their environment."""
    port = free_port()
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | more
    return [
        subprocess.Popen(
            [sys.executable, *words],
            env=environment(RANK=str(k), LOCAL_RANK=str(k), **common),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for k in range(ranks)
    ]


_EACH = """
import json, os, sys
from dpo.cli import main
for port, words in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    main(words)
"""


def run_each(ranks: int, commands: Sequence[Sequence[str]], timeout: float = 500) -> None:
    """Several `dpo` commands on the same processes, one after another: they start and import once."""
    ports: list[int] = []
    while len(ports) < len(commands):
        ports += {free_port()} - set(ports)
    words = json.dumps(list(zip(ports, commands, strict=True)))
    results = run(ranks, "-c", _EACH, words, timeout=timeout)
    assert [status for status, _, _ in results] == [0] * ranks, results


def copy_run(run: Path, to: Path) -> None:
    """A run as it was at its newest checkpoint."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "model")
    (to / "finished.json").unlink()


def alone(*words: str, timeout: float = 300) -> list[tuple[int, str, str]]:
    """`python WORDS` in one process, without what torchrun sets."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return finish([subprocess.Popen([sys.executable, *words], env=environment(), cwd=ROOT, **pipes)], timeout)


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 300) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of every rank."""
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(processes, outputs, strict=True)]


def run(ranks: int, *words: str, timeout: float = 300, **more: str) -> list[tuple[int, str, str]]:
    return finish(start(ranks, words, **more), timeout)
