"""`dpo demo`: a tiny language model learns from real preferences what to write, through the same code as `dpo train`.

embedded pairs -> tiny model, warmed up -> dpo train -> dpo score -> samples before and after -> a picture
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from dpo.checkpoint import save_model
from dpo.commands import DemoConfig, ScoreConfig
from dpo.config import TrainConfig
from dpo.console import console, say, table
from dpo.data import load_preferences
from dpo.demo.figure import draw
from dpo.demo.model import build_model, train_tokenizer, warm_up
from dpo.demo.samples import WordJudge, generate
from dpo.durable import write_text
from dpo.errors import UserError
from dpo.load import eos_token_ids
from dpo.score import score
from dpo.train import train

MARKER = "demo.json"
SAMPLES = 64  # of each prompt
SHOWN = 3
Pair = dict[str, str]


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, print what happens, and leave everything in the output folder.

    Returns what `demo.json` in that folder holds: accuracies, shares of positive samples, seconds by stage.
    Raises UserError if the output folder holds something that is not a demo's run.
    """
    transformers_logging.disable_progress_bar()
    output = _open_folder(Path(config.output))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products this small are slower on more, and far slower where other programs run
    try:
        result = _run(config, output)
    finally:
        torch.set_num_threads(threads)
    write_text(output / MARKER, json.dumps(result, indent=2) + "\n")
    _summary(output, result)
    return result


def _run(config: DemoConfig, output: Path) -> dict[str, Any]:
    stages = Stages()
    pairs = load_pairs()
    with stages("a tiny language model, from scratch"):
        size = _make_base(output, pairs, config.seed)
    training = train_config(config)
    with stages("preference training, the same as", command("train", training)):
        evals = train(training).evals
    scoring = score_config(config)
    with stages("rewards of the held-out pairs, the same as", command("score", scoring)):
        margins = [record["margin"] for record in score(scoring)]
    with stages("what it writes, with the same random numbers before and after"):
        share = _samples(output, pairs["train"], config.seed)
        counts = f"{len(pairs['train']):,} pairs for training, {len(margins)} held out"
        title = f"dpo demo: a Llama of {size:,} weights, {counts}"
        draw(Path(training.output), margins, output / "demo.png", title)
    return {
        "seed": config.seed,
        "pairs": {split: len(rows) for split, rows in pairs.items()},
        "held_out_accuracy": {"before": evals[0]["accuracy"], "after": evals[-1]["accuracy"]},
        "samples": SAMPLES * len({row["prompt"] for row in pairs["train"]}),
        "positive_samples": share,
        "seconds": stages.seconds,
    }


class Stages:
    """Numbered headings, and the seconds spent under each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._title = ""

    def __call__(self, title: str, detail: str = "") -> Stages:
        self._title = title.split(",")[0]
        console.rule(f"[bold]{len(self.seconds) + 1}. {title}", align="left")
        if detail:
            say(f"  {detail}")
        return self

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.seconds[self._title] = round(time.perf_counter() - self._start, 1)


def load_pairs() -> dict[str, list[Pair]]:
    """The embedded pairs by split, `train` and `held-out`: rows of prompt, chosen, rejected."""
    text = (resources.files("dpo.demo") / "preferences.jsonl").read_text(encoding="utf-8")
    splits: dict[str, list[Pair]] = {"train": [], "held-out": []}
    for line in text.splitlines():
        row = json.loads(line)
        splits[row.pop("split")].append(row)
    return splits


def train_config(config: DemoConfig) -> TrainConfig:
    """The demo's training as a user would configure it."""
    output = Path(config.output)
    return TrainConfig(
        model=str(output / "base"),
        data=str(output / "train.jsonl"),
        eval_data=str(output / "heldout.jsonl"),
        output=str(output / "run"),
        reference_cache=str(output / "references"),
        beta=0.5,
        lr=3e-4,
        warmup_steps=10,
        pairs_per_step=32,
        epochs=config.epochs,
        eval_every=19,
        seed=config.seed,
    )


def score_config(config: DemoConfig) -> ScoreConfig:
    """The scoring of the held-out pairs by the trained model as a user would configure it."""
    training = train_config(config)
    return ScoreConfig(
        model=f"{training.output}/model",
        reference=training.model,
        data=str(training.eval_data),
        output=str(Path(config.output) / "scores.jsonl"),
        beta=training.beta,
    )


def command(name: str, config: TrainConfig | ScoreConfig) -> str:
    """The `dpo` command line that stands for `config`: every setting that is not at its default."""
    words = ["dpo", name]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            words += ["--" + field.name.replace("_", "-"), f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)


def _open_folder(output: Path) -> Path:
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / MARKER).is_file())):
        raise UserError(f"--output {output}: expected a new folder, or one that `dpo demo` made; found something else")
    if output.exists():
        shutil.rmtree(output)
    try:
        output.mkdir(parents=True)
        write_text(output / MARKER, "{}\n")
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror}") from error
    return output


def _make_base(output: Path, splits: Mapping[str, Sequence[Pair]], seed: int) -> int:
    """Write train.jsonl, heldout.jsonl and base/, a model that writes sentences of both kinds.

    Returns the model's number of weights.
    """
    pairs = splits["train"]
    _write_rows(output / "train.jsonl", pairs)
    _write_rows(output / "heldout.jsonl", splits["held-out"])
    say(f"  {len(pairs)} pairs of review sentences: a positive one is chosen, a negative one rejected")
    tokenizer = train_tokenizer(row["prompt"] + row[side] for row in pairs for side in ("chosen", "rejected"))
    model = build_model(tokenizer, seed)
    size = sum(parameter.numel() for parameter in model.parameters())
    say(f"  byte-level BPE of {len(tokenizer)} tokens, Llama of {size:,} weights; it first learns to write both kinds")
    groups = list(load_preferences(pairs, tokenizer, eos_token_ids=eos_token_ids(model, tokenizer)))
    loss = warm_up(model, groups, seed=seed)
    say(f"  language modelling loss {loss:.2f} nats per token")
    save_model(output / "base", model, tokenizer)
    return size


def _samples(output: Path, pairs: Sequence[Pair], seed: int) -> dict[str, float]:
    """Sample from both models, write samples.jsonl, print the first few side by side; shares of positive samples."""
    prompts = list(dict.fromkeys(row["prompt"] for row in pairs))
    judge = WordJudge([row["chosen"] for row in pairs], [row["rejected"] for row in pairs])
    before, after = (
        generate(folder, prompts, per_prompt=SAMPLES, seed=seed)
        for folder in (output / "base", output / "run" / "model")
    )
    rows = [
        {"prompt": prompt, "before": old, "after": new}
        for prompt, olds, news in zip(prompts, before, after, strict=True)
        for old, new in zip(olds, news, strict=True)
    ]
    _write_rows(output / "samples.jsonl", rows)
    shown = Table(
        title=f"the first {SHOWN} of {SAMPLES} samples a prompt, green where a word classifier finds them positive",
        title_justify="left",
    )
    for name in ("prompt", "before", "after"):
        shown.add_column(name, overflow="fold", ratio=None if name == "prompt" else 1)
    for start in range(0, len(rows), SAMPLES):
        for row in rows[start : start + SHOWN]:
            colours = ("", *("green" if judge.is_positive(row[name]) else "red" for name in ("before", "after")))
            shown.add_row(*(Text(text.strip(), style) for text, style in zip(row.values(), colours, strict=True)))
        shown.add_section()
    console.print(shown, soft_wrap=False)
    return {name: judge.share_positive(row[name] for row in rows) for name in ("before", "after")}


def _write_rows(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _summary(output: Path, result: dict[str, Any]) -> None:
    """The end of the demo: figures, files, and what to do next."""
    console.rule("[bold]done", align="left")
    accuracy, share, seconds = result["held_out_accuracy"], result["positive_samples"], result["seconds"]
    rows = [
        (f"reward accuracy, {result['pairs']['held-out']} held-out pairs", accuracy["before"], accuracy["after"]),
        (f"share of {result['samples']} samples found positive", share["before"], share["after"]),
    ]
    table("", ("", "before", "after"), rows)
    say(f"{sum(seconds.values()):.0f} s in all: " + ", ".join(f"{name} {value} s" for name, value in seconds.items()))
    say(f"picture       {output}/demo.png")
    say(f"samples       {output}/samples.jsonl")
    say(f"models        {output}/base (before), {output}/run/model (after)")
    say("next, your own model and preferences:")
    say("  dpo train --model MODEL --data PREFERENCES.jsonl --eval-fraction 0.1 --output runs/mine")
    say("  dpo train --help")
