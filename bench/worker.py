"""One side in a process of its own, driven by lines of JSON: sides take turns and share no allocator, no threads.

    python -m bench.worker '{"side": "shared", "mix": {...}, "settings": {...}, "steps": 4}'

Answers on standard output, one line of JSON a command: `step I` runs step I, `memory` reads the peak, `profile I` runs
step I under the profiler, `quit` ends. The first line, unasked, is the side's configuration.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from bench.workload import LengthMix, ModelShape, Pair, StepSettings
from dpo.resident import peak_bytes, resident_bytes

SIDES = ("trl", "padded", "shared", "floor")
EXTRA_SIDES = ("trl-patched", "trl-shared")
"""Run when named: TRL with `dpo_kernels.patch_trl`, and with `dpo.patch_trl`."""


def build_side(name: str, settings: StepSettings, steps: Sequence[Sequence[Pair]]) -> Any:
    """The side called `name`; its heavy imports happen here."""
    if name.startswith("trl"):
        from bench.trl_step import TrlSide

        return TrlSide(settings, steps, name)
    if name == "floor":
        from bench.floor import FloorSide

        return FloorSide(settings, steps)
    from bench.our_step import OurSide

    return OurSide(settings, steps, layout="padded" if name == "padded" else "shared")


def main(argument: str) -> None:
    """Serve one side until `quit` or the end of standard input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print must not mix with the answers
    spec = json.loads(argument)
    settings = StepSettings(**{**spec["settings"], "model": ModelShape(**spec["settings"]["model"])})
    mix = LengthMix(**spec["mix"])
    import torch

    torch.set_num_threads(settings.threads)
    steps = mix.draw(spec["steps"], settings.pairs_per_step, settings.model.vocabulary, settings.data_seed)
    side = build_side(spec["side"], settings, steps)
    ready = {"configuration": side.configuration(), "resident_bytes_before_steps": resident_bytes()}
    print(json.dumps(ready), file=answers)
    for line in sys.stdin:
        command, *rest = line.split()
        if command == "quit":
            break
        print(json.dumps(_answer(side, command, steps, rest, settings.timer)), file=answers)


def _answer(
    side: Any, command: str, steps: Sequence[Sequence[Pair]], rest: list[str], timer: Callable[[], float]
) -> dict[str, Any]:
    if command == "memory":
        return {"peak_bytes": peak_bytes()}
    pairs = steps[int(rest[0])]
    if command == "profile":
        from bench.profile import profile_step

        return profile_step(side, pairs)
    assert command == "step", command
    start = timer()
    result = side.step(pairs)
    seconds = timer() - start
    # the floor is a computed time, not the time that computing it takes
    return {"seconds": result.seconds if hasattr(result, "seconds") else seconds, "result": _plain(result)}


def _plain(result: Any) -> Any:
    return asdict(result) if hasattr(result, "__dataclass_fields__") else result


class Worker:
    """The parent's end of one worker process."""

    def __init__(self, name: str, settings: StepSettings, mix: LengthMix, steps: int):
        spec = {"side": name, "mix": asdict(mix), "settings": settings.asdict(), "steps": steps}
        environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "TOKENIZERS_PARALLELISM": "false"}
        if settings.products == "torch":
            environment["DPO_KERNELS_PRODUCTS"] = "torch"
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        ready = self._read()
        self.configuration: dict[str, Any] = ready["configuration"]
        self.resident_before_steps: int = ready["resident_bytes_before_steps"]

    def ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"side {self.name!r} ended with status {self._process.wait()}; its message is above")
        return json.loads(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        if self._process.poll() is None:
            self._process.stdin.write("quit\n")
            self._process.stdin.close()
            self._process.wait()


if __name__ == "__main__":
    main(sys.argv[1])
