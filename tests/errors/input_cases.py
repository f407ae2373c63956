"""Bad input: data files, rows, flags and YAML."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.errors.case import GOOD, case, score_words, train_words

# --- Files


def _data_file(name: str, content: bytes | None, what: str) -> None:
    def make(here: Path, toy: Path, entry: str) -> list[str]:
        path = here / name
        if content is not None:
            path.write_bytes(content)
        words = train_words if entry == "train" else score_words
        return words(here, toy, "--data", str(path))

    for entry in ("train", "score"):
        case("file", entry, what)(lambda here, toy, entry=entry: make(here, toy, entry))


_LINE = json.dumps(GOOD).encode() + b"\n"
_data_file("none.jsonl", None, "data that is not there")
_data_file("empty.jsonl", b"", "an empty file")
_data_file("data.txt", _LINE, "a suffix that is not known")
_data_file("half.jsonl", _LINE + b'{"prompt": "a', "a line of JSON that is cut short")
_data_file("list.jsonl", _LINE + b"[1, 2]\n", "a line that is not an object")
_data_file("deep.jsonl", _LINE + b"[" * 100_000 + b"\n", "JSON nested too deep")
_data_file("half.json", b'[{"prompt": "a"', "a JSON document that is cut short")
_data_file("latin.jsonl", b'{"prompt": "\xe9", "chosen": "b", "rejected": "c"}\n', "text that is not UTF-8")
_data_file("null.jsonl", b"\0" * 64, "a file of zeros")
_data_file("bad.parquet", b"PAR1" + b"\0" * 64, "a damaged Parquet file")
_data_file("short.csv", b'prompt,chosen,rejected\na,"b\n', "a CSV file with an open quote")


@case("file", "train", "an output that is a file")
def _output_file(here: Path, toy: Path) -> list[str]:
    (here / "file").write_text("x")
    return train_words(here, toy, "--output", str(here / "file"))


@case("file", "train", "an output that cannot be written")
def _output_nowhere(here: Path, toy: Path) -> list[str]:
    (here / "file").write_text("x")
    return train_words(here, toy, "--output", str(here / "file" / "run"))


@case("file", "train", "an output with somebody's files")
def _output_others(here: Path, toy: Path) -> list[str]:
    (here / "letters").mkdir()
    (here / "letters" / "dear.txt").write_text("x")
    return train_words(here, toy, "--output", str(here / "letters"), "--overwrite")


@case("file", "train", "an output that holds a run")
def _output_run(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--output", str(toy / "run"))


@case("file", "score", "an output that exists")
def _score_output(here: Path, toy: Path) -> list[str]:
    (here / "scores.jsonl").write_text("x")
    return score_words(here, toy)


@case("file", "score", "an output that cannot be written")
def _score_nowhere(here: Path, toy: Path) -> list[str]:
    (here / "file").write_text("x")
    return score_words(here, toy, "--output", str(here / "file" / "scores.jsonl"))


@case("file", "train", "a folder without data")
def _empty_folder(here: Path, toy: Path) -> list[str]:
    (here / "data").mkdir()
    return train_words(here, toy, "--data", str(here / "data"))


# --- Rows


def _rows(what: str, *rows: Any) -> None:
    def make(here: Path, toy: Path) -> list[str]:
        (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return train_words(here, toy, "--data", str(here / "rows.jsonl"))

    case("row", "train", what)(make)


_rows("no known columns", {"question": "a", "answer": "b"})
_rows("a missing field", {"prompt": "a ", "chosen": "b", "rejected": None})
_rows("a field that is a number", {"prompt": 3, "chosen": "b", "rejected": "c"})
_rows("empty completions", {"prompt": "a ", "chosen": "", "rejected": " "})
_rows("equal completions", {"prompt": "a ", "chosen": "b", "rejected": "b"})
_rows("one bad row of two", GOOD, {"prompt": "a ", "chosen": "b", "rejected": "b"})
_rows("half a surrogate pair", {"prompt": "a ", "chosen": "\ud800", "rejected": "c"})
_rows("messages without a role", {"prompt": [{"content": "a"}], "chosen": [{"content": "b"}], "rejected": []})
_rows(
    "conversations for a tokenizer without a template",
    {
        "prompt": [{"role": "user", "content": "a"}],
        "chosen": [{"role": "assistant", "content": "b"}],
        "rejected": [{"role": "assistant", "content": "c"}],
    },
)
_rows("scores that are no numbers", {"prompt": "a", "completions": ["b", "c"], "scores": ["high", "low"]})
_rows("scores of another number", {"prompt": "a", "completions": ["b", "c"], "scores": [1.0]})
_rows("one score for all", {"prompt": "a", "completions": ["b", "c"], "scores": [1.0, 1.0]})


@case("row", "train", "a prompt with a completion over the token budget")
def _over_budget(here: Path, toy: Path) -> list[str]:
    (here / "rows.jsonl").write_text(json.dumps({"prompt": "a" * 60, "chosen": "b" * 60, "rejected": "c"}) + "\n")
    return train_words(here, toy, "--data", str(here / "rows.jsonl"), "--token-budget", "99")


@case("row", "train", "an unpaired row after good ones, and no tolerance")
def _no_tolerance(here: Path, toy: Path) -> list[str]:
    rows = [GOOD] * 9 + [{"prompt": "a ", "chosen": ["b"], "rejected": "c"}]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train_words(here, toy, "--data", str(here / "rows.jsonl"), "--max-bad-fraction", "0")


# --- Flags


def _flags(what: str, *flags: str, entry: str = "train") -> None:
    words = {"train": train_words, "score": score_words}[entry]
    case("flag", entry, what)(lambda here, toy: words(here, toy, *flags))


for flag, value in [
    *(("--beta", v) for v in ("0", "-1", "nan", "inf", "much")),
    *(("--lr", v) for v in ("0", "nan", "inf")),
    *(("--token-budget", v) for v in ("0", "5", "1e99")),
    ("--max-prompt-length", "0"),
    ("--max-bad-fraction", "2"),
    ("--head-workspace-mb", "0"),
    ("--device", "toaster"),
    ("--dtype", "int4"),
    ("--data-split", "test"),
    ("--data-split", "train[90%:10%]"),
]:
    _flags(f"{flag} {value}", flag, value)
    if flag != "--lr":
        _flags(f"{flag} {value}", flag, value, entry="score")
for flag, value in [
    ("--pairs-per-step", "0"),
    ("--epochs", "0"),
    ("--epochs", "1.5"),
    ("--max-steps", "-1"),
    ("--warmup-steps", "-1"),
    ("--weight-decay", "nan"),
    ("--weight-decay", "inf"),
    ("--grad-clip", "-1"),
    ("--label-smoothing", "0.5"),
    ("--eval-fraction", "1"),
    ("--keep-checkpoints", "0"),
    ("--log-every", "0"),
    ("--loss", "hope"),
    ("--optimizer", "luck"),
    ("--reference", "memory"),
    ("--seed", "x"),
    ("--seed", "-1"),
    ("--log-to", "paper"),
    ("--sample-prompts", "4"),
    ("--kernel-backend", "triton"),
    ("--head-plan", "frozen"),
]:
    _flags(f"{flag} {value}", flag, value)
_flags("a flag that is not known", "--no-such-flag")
_flags("a flag that is nearly known", "--warmup-step", "10")
_flags("a flag of another trainer", "--learning_rate", "1e-6")
_flags("a flag of another command", "--epochs", "2", entry="score")
_flags("a flag without its value", "--output")
_flags("a flag where a value belongs", "--output", "--overwrite")
_flags("a value for a switch", "--overwrite=yes")
_flags("--epochs= with nothing", "--epochs=")
_flags("a value too many", "--beta", "0.1", "0.2")
_flags("--resume with --overwrite", "--resume", "auto", "--overwrite")
_flags("--hub-private alone", "--hub-private")
_flags("--log-to none with another", "--log-to", "none", "wandb")
case("flag", "train", "no --model")(lambda here, toy: ["train", "--data", str(toy / "pairs.jsonl")])
case("flag", "score", "no --reference")(
    lambda here, toy: ["score", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl")]
)
case("flag", "merge", "no --output")(lambda here, toy: ["merge", "--adapter", str(toy / "model")])
case("flag", "report", "no run")(lambda here, toy: ["report"])
case("flag", "report", "a second run")(lambda here, toy: ["report", str(toy / "run"), str(here)])
case("flag", "plan", "--ranks many")(lambda here, toy: ["plan", "--model", "1b", "--ranks", "many"])
case("flag", "dpo", "no command")(lambda here, toy: [])
case("flag", "dpo", "a command that is nearly known")(lambda here, toy: ["trian"])
case("flag", "dpo", "a flag before the command")(lambda here, toy: ["--beta", "0.1", "train"])
case("flag", "doctor", "--device toaster")(lambda here, toy: ["doctor", "--device", "toaster"])
case("flag", "dpo", "a command that is not known")(lambda here, toy: ["dance"])


@case("flag", "train", "training data as held-out data")
def _same_data(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--eval-data", str(toy / "pairs.jsonl"))


@case("flag", "train", "--eval-data with --eval-fraction")
def _two_evals(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--eval-data", str(toy / "held_out.jsonl"), "--eval-fraction", "0.1")


# --- YAML


def _yaml(what: str, content: bytes | None, entry: str = "train") -> None:
    def make(here: Path, toy: Path) -> list[str]:
        if content is not None:
            (here / "run.yaml").write_bytes(content)
        words = train_words if entry == "train" else score_words
        return words(here, toy, "--config", str(here / "run.yaml"))

    case("YAML", entry, what)(make)


_yaml("no such file", None)
_yaml("no such file", None, "score")
_yaml("a list", b"- beta\n")
_yaml("a text", b"beta\n")
_yaml("bad syntax", b"beta: [\n")
_yaml("not UTF-8", b"beta: \xff\xfe\n")
_yaml("nested too deep", b"[" * 20_000)
_yaml("a number of too many digits", b"seed: " + b"9" * 5000 + b"\n")
_yaml("a Python object", b"beta: !!python/object/apply:os.getcwd []\n")
_yaml("an unknown setting", b"betta: 0.1\n")
_yaml("a setting of training", b"epochs: 2\n", "score")
_yaml("several values", b"beta: [0.1, 0.2]\n")
_yaml("a mapping for a value", b"model: {name: x}\n")
_yaml("a text for a number", b"lr: fast\n")
_yaml("a number for a switch", b"share_prefix: 3\n")
_yaml("a switch for a number", b"epochs: true\n")
_yaml("a choice that is none", b"optimizer: luck\n")
_yaml("no number", b"lr: .nan\n")
_yaml("infinity", b"lr: .inf\n")
_yaml("null for a number that must be", b"lr: null\n")
_yaml("null bytes", b"\0\0\0")
