"""Peak memory of `dpo train` on prompts of 8,000 tokens with four completions each, in a process of its own.

python -m bench.long_group                               # the benchmark's model, gradient checkpointing
python -m bench.long_group --prompt 4000 --vocabulary 128000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from bench.workload import EOS, ModelShape

# the process reports its own peak, as `dpo.resident` counts it
RUN = (
    "import sys; from dpo.resident import peak_bytes; from dpo.cli import main; main(sys.argv[1:]); print(peak_bytes())"
)


def write_model(folder: Path, shape: ModelShape) -> None:
    """The benchmark's model with a tokenizer of bytes, whose ids are a part of the vocabulary."""
    words = ["<pad>", "<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    assert words[EOS] == "<eos>"
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    model = shape.build()
    model.config.max_position_embeddings = 16384
    model.save_pretrained(folder)


def write_data(path: Path, prompt: int, completion: int, rows: int = 2) -> None:
    """Rows of bytes: a prompt of `prompt` tokens, four completions of `completion`, with scores."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    with path.open("w") as file:
        for _ in range(rows):
            completions = ["".join(draw.choices(letters, k=completion - 1)) for _ in range(4)]
            row = {
                "prompt": "".join(draw.choices(letters, k=prompt)),
                "completions": completions,
                "scores": [4, 3, 2, 1],
            }
            file.write(json.dumps(row) + "\n")


def peak_of_run(shape: ModelShape, prompt: int, completion: int, flags: Sequence[str] = ()) -> int:
    """Bytes of the largest resident set of one step of `dpo train` in a fresh process."""
    with tempfile.TemporaryDirectory(prefix="bench-long-") as name:
        folder = Path(name)
        write_model(folder / "model", shape)
        write_data(folder / "data.jsonl", prompt, completion)
        words = ["train", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl")]
        words += ["--output", str(folder / "run"), "--max-steps", "1", "--groups-per-step", "1", "--no-check-sharing"]
        words += ["--max-prompt-length", str(prompt), "--token-budget", str(prompt + 4 * completion), *flags]
        done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"dpo train ended with status {done.returncode}: {done.stderr[-2000:]}")
        return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--completion", type=int, default=120)
    parser.add_argument("--vocabulary", type=int, default=ModelShape().vocabulary)
    parser.add_argument("--no-checkpointing", action="store_true")
    options = parser.parse_args()
    shape = replace(ModelShape(), vocabulary=options.vocabulary)
    flags = [] if options.no_checkpointing else ["--gradient-checkpointing"]
    peak = peak_of_run(shape, options.prompt, options.completion, flags)
    print(f"prompt {options.prompt}, four completions of {options.completion} tokens: peak {peak / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
