"""A real chat model on real preferences: SmolLM2-135M-Instruct learns which movie-review snippets people rated higher.

    python -m bench.real_run

fetches what is missing and trains, which is the same as

    python -m bench.data.fetch_smollm2
    python -m bench.data.fetch_vader
    dpo train --model .cache/fused-dpo/smollm2-135m-instruct --data .cache/fused-dpo/vader/train.jsonl \
        --eval-data .cache/fused-dpo/vader/heldout.jsonl --eval-split 'train[:128]' --output runs/smollm2-vader \
        --max-steps 24 --pairs-per-step 8 --lr 2e-5 --warmup-steps 2 --optimizer adamw --log-every 4

and prints held-out reward accuracy before and after, and the time. Flags that this script does not know go to
`dpo train`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from bench.data import fetch_smollm2, fetch_vader
from bench.data.download import CACHE, run_script
from dpo.errors import UserError
from dpo.metrics import read_json_lines


def train_flags(cache: Path, output: Path) -> list[str]:
    """The flags of `dpo train`: 192 pairs in 24 steps, 128 held-out pairs."""
    flags = f"--model {cache}/smollm2-135m-instruct --data {cache}/vader/train.jsonl"
    flags += f" --eval-data {cache}/vader/heldout.jsonl --eval-split train[:128] --output {output}"
    flags += " --max-steps 24 --pairs-per-step 8 --lr 2e-5 --warmup-steps 2 --optimizer adamw --log-every 4"
    return flags.split()


def main() -> None:
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M-Instruct on snippets that people rated.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for the model and the data")
    parser.add_argument("--output", type=Path, default=Path("runs/smollm2-vader"), help="folder of the run")
    arguments, extra = parser.parse_known_args()
    fetch_smollm2.fetch(arguments.cache / "smollm2-135m-instruct")
    fetch_vader.fetch(arguments.cache / "vader")
    flags = [*train_flags(arguments.cache, arguments.output), *extra]
    print("dpo train", shlex.join(flags), flush=True)
    start, used = time.perf_counter(), os.times()
    finished = subprocess.run([sys.executable, "-m", "dpo.cli", "train", *flags], check=False)
    if finished.returncode:
        raise UserError(f"dpo train ended with status {finished.returncode}")
    wall, now = time.perf_counter() - start, os.times()
    processor = now.children_user - used.children_user + now.children_system - used.children_system
    evals = read_json_lines(arguments.output / "eval.jsonl")
    print(
        f"held-out reward accuracy {evals[0]['accuracy']:.3f} -> {evals[-1]['accuracy']:.3f} "
        f"over {evals[-1]['pairs']:.0f} pairs; {wall:.0f} s, {processor:.0f} s of processor time"
    )


if __name__ == "__main__":
    run_script(main)
