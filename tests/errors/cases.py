"""Bad input by category and entry point: what is wrong, and how it is handed in.

A case makes its input in a folder of its own, `here`, and returns command-line words, or a function to call. `toy` is a
folder with a good model, data and a run.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GOOD = {"prompt": "a ", "chosen": "b", "rejected": "c"}
Make = Callable[[Path, Path], "list[str] | Callable[[], object]"]


@dataclass(frozen=True)
class Case:
    """make(here, toy) prepares the input."""

    category: str
    entry: str
    what: str
    make: Make

    @property
    def name(self) -> str:
        return f"{self.category}: {self.entry}: {self.what}"


CASES: list[Case] = []


def case(category: str, entry: str, what: str) -> Callable[[Make], Make]:
    def keep(make: Make) -> Make:
        CASES.append(Case(category, entry, what, make))
        return make

    return keep


def train_words(here: Path, toy: Path, *flags: str) -> list[str]:
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(here / "run")]
    return [*words, "--max-steps", "1", "--pairs-per-step", "4", "--log-to", "none", *flags]


def score_words(here: Path, toy: Path, *flags: str) -> list[str]:
    words = ["score", "--model", str(toy / "model"), "--reference", str(toy / "model")]
    return [*words, "--data", str(toy / "pairs.jsonl"), "--output", str(here / "scores.jsonl"), *flags]


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
_flags("a value too many", "--beta", "0.1", "0.2")
_flags("--resume with --overwrite", "--resume", "auto", "--overwrite")
_flags("--hub-private alone", "--hub-private")
_flags("--log-to none with another", "--log-to", "none", "wandb")
case("flag", "train", "no --model")(lambda here, toy: ["train", "--data", str(toy / "pairs.jsonl")])
case("flag", "score", "no --reference")(
    lambda here, toy: ["score", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl")]
)
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
_yaml("no number", b"lr: .nan\n")
_yaml("infinity", b"lr: .inf\n")
_yaml("null for a number that must be", b"lr: null\n")
_yaml("null bytes", b"\0\0\0")


# --- Models


def _model(what: str, *flags: str, entries: tuple[str, ...] = ("train", "score", "doctor")) -> Callable[[Any], None]:
    """The decorated function spoils a copy of the toy model in the folder it is given."""

    def keep(spoil: Callable[[Path], object]) -> None:
        def make(here: Path, toy: Path, entry: str) -> list[str]:
            folder = here / "model"
            shutil.copytree(toy / "model", folder)
            spoil(folder)
            if entry == "doctor":
                return ["doctor", "--model", str(folder), *flags]
            words = train_words if entry == "train" else score_words
            return words(here, toy, "--model", str(folder), *flags)

        for entry in entries:
            case("model", entry, what)(lambda here, toy, entry=entry: make(here, toy, entry))

    return keep


def _settings(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))


_LOADED = ("train", "score")
_model("a folder that is not there")(shutil.rmtree)
_model("a folder without config.json")(lambda folder: (folder / "config.json").unlink())
_model("a damaged config.json")(lambda folder: (folder / "config.json").write_text("{"))
_model("config.json that is a list")(lambda folder: (folder / "config.json").write_text("[]"))
_model("an unknown model type")(lambda folder: _settings(folder, model_type="dream"))
_model("an encoder-decoder")(lambda folder: _settings(folder, model_type="t5"))
_model("an encoder")(lambda folder: _settings(folder, model_type="bert"))
_model("sizes that cannot be", entries=("train", "doctor"))(lambda folder: _settings(folder, num_attention_heads=5))
_model("a size that is a text", entries=("train", "doctor"))(lambda folder: _settings(folder, hidden_size="big"))
_model("code of its own, unasked", entries=("train", "doctor"))(
    lambda folder: _settings(
        folder, model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
)
_model("no weights", entries=_LOADED)(lambda folder: (folder / "model.safetensors").unlink())
_model("damaged weights", entries=_LOADED)(
    lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:999])
)
_model("weights that are text", entries=_LOADED)(lambda folder: (folder / "model.safetensors").write_text("x" * 99))
_model("weights of other sizes", entries=_LOADED)(lambda folder: _settings(folder, hidden_size=48))
_model("a damaged GGUF file", entries=("train",))(
    lambda folder: ((folder / "config.json").unlink(), (folder / "m.gguf").write_bytes(b"GGUF" + b"\0" * 9))
)


def _weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


_model("a missing weight", entries=_LOADED)(
    lambda folder: _weights(folder, lambda weights: weights.pop("model.norm.weight"))
)
_model("a pickle that runs code", entries=("train",))(
    lambda folder: (
        (folder / "model.safetensors").unlink(),
        (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR."),
    )
)


@case("model", "train", "a reference of another vocabulary")
def _other_vocabulary(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--reference-model", str(toy / "wide"))


@case("model", "score", "a reference of another vocabulary")
def _other_vocabulary_score(here: Path, toy: Path) -> list[str]:
    return score_words(here, toy, "--reference", str(toy / "wide"))


@case("model", "score", "a reference that is not there")
def _no_reference(here: Path, toy: Path) -> list[str]:
    return score_words(here, toy, "--reference", str(here / "none"))


# --- Weights that are not numbers


def _nan(folder: Path) -> None:
    _weights(folder, lambda weights: weights["model.norm.weight"].fill_(float("nan")))


def _nan_case(entry: str, what: str, *flags: str) -> None:
    def make(here: Path, toy: Path) -> list[str]:
        shutil.copytree(toy / "model", here / "model")
        _nan(here / "model")
        words = train_words if entry == "train" else score_words
        return words(here, toy, "--model", str(here / "model"), *flags)

    case("NaN weights", entry, what)(make)


_nan_case("train", "as they are")
_nan_case("score", "as they are")
_nan_case("train", "without the check", "--no-check-sharing", "--max-skipped", "1")
_nan_case("score", "without the check", "--no-check-sharing")


@case("NaN weights", "train", "in the reference")
def _nan_reference(here: Path, toy: Path) -> list[str]:
    shutil.copytree(toy / "model", here / "model")
    _nan(here / "model")
    return train_words(here, toy, "--reference-model", str(here / "model"), "--max-skipped", "1")


# --- Tokenizers

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def _without_tokenizer(folder: Path) -> None:
    for name in _TOKENIZER:
        (folder / name).unlink(missing_ok=True)


def _without_eos(folder: Path) -> None:
    for name in ("tokenizer_config.json", "config.json", "generation_config.json"):
        path = folder / name
        if path.exists():
            held = json.loads(path.read_text())
            path.write_text(json.dumps({k: v for k, v in held.items() if "eos" not in k}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    _settings(folder, eos_token_id=None)


def _too_many_tokens(folder: Path) -> None:
    held = json.loads((folder / "tokenizer.json").read_text())
    held["added_tokens"].append(
        {
            "id": 400,
            "content": "good",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": False,
        }
    )
    (folder / "tokenizer.json").write_text(json.dumps(held))


def _tokenizer(what: str, spoil: Callable[[Path], object]) -> None:
    def make(here: Path, toy: Path, entry: str) -> list[str]:
        shutil.copytree(toy / "model", here / "model")
        spoil(here / "model")
        words = train_words if entry == "train" else score_words
        return words(here, toy, "--model", str(here / "model"))

    for entry in _LOADED:
        case("tokenizer", entry, what)(lambda here, toy, entry=entry: make(here, toy, entry))


_tokenizer("none", _without_tokenizer)
_tokenizer("a damaged tokenizer.json", lambda folder: (folder / "tokenizer.json").write_text("{"))
_tokenizer("no end-of-sequence", _without_eos)
_tokenizer("more tokens than the model has", _too_many_tokens)


# --- Checkpoints


def _resume_words(here: Path, toy: Path, *flags: str) -> list[str]:
    words = train_words(here, toy, "--max-steps", "3", "--save-every", "1", "--epochs", "9", "--resume", "auto")
    return [*words, *flags]


def _checkpoint(what: str, spoil: Callable[[Path], object], *flags: str) -> None:
    """Spoils the newest checkpoint of a run."""

    def make(here: Path, toy: Path) -> list[str]:
        shutil.copytree(toy / "run", here / "run")
        newest = max((here / "run" / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
        spoil(newest)
        return _resume_words(here, toy, *flags)

    case("checkpoint", "train --resume", what)(make)


def _cut_state(folder: Path) -> None:
    path = folder / "state.safetensors"
    path.write_bytes(path.read_bytes()[:500])


def _pickle_state(folder: Path) -> None:
    (folder / "state.safetensors").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def _old_state(folder: Path) -> None:
    (folder / "state.json").write_text('{"format": 0, "state": {}}')


_checkpoint("state that is cut short", _cut_state)
_checkpoint("state of another format", _old_state)
_checkpoint("state that is gone", lambda folder: (folder / "state.safetensors").unlink())
_checkpoint("state that is a pickle that runs code", _pickle_state)
_checkpoint("a model that is gone", lambda folder: shutil.rmtree(folder / "model"))
_checkpoint(
    "a model that is cut short",
    lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}"),
)
_checkpoint("settings that are damaged", lambda folder: (folder.parent.parent / "config.yaml").write_text("[1"))
_checkpoint("settings that are a list", lambda folder: (folder.parent.parent / "config.yaml").write_text("- 1"))
_checkpoint("another objective", lambda folder: None, "--beta", "0.7")
_checkpoint("another optimizer", lambda folder: None, "--optimizer", "adamw")


@case("checkpoint", "train --resume", "no run to go on with")
def _no_run(here: Path, toy: Path) -> list[str]:
    return _resume_words(here, toy, "--resume", "must")


# --- Adapters


@case("adapter", "train", "that is not there")
def _no_adapter(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--adapter", str(here / "none"))


@case("adapter", "train", "a damaged adapter_config.json")
def _bad_adapter(here: Path, toy: Path) -> list[str]:
    (here / "adapter").mkdir()
    (here / "adapter" / "adapter_config.json").write_text("{")
    return train_words(here, toy, "--adapter", str(here / "adapter"))


@case("adapter", "train", "--lora-r 0")
def _rank_0(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--lora-r", "0")


@case("adapter", "train", "modules that the model does not have")
def _no_modules(here: Path, toy: Path) -> list[str]:
    return train_words(here, toy, "--lora-r", "2", "--lora-targets", "nonsense")


@case("adapter", "merge", "that is not there")
def _merge_none(here: Path, toy: Path) -> list[str]:
    return ["merge", "--adapter", str(here / "none"), "--output", str(here / "merged")]


# --- The store of the reference's log-probs


@case("store", "train", "a place that is a file")
def _store_file(here: Path, toy: Path) -> list[str]:
    (here / "file").write_text("x")
    return train_words(here, toy, "--reference-cache", str(here / "file"))


@case("store", "cache", "data that is not there")
def _cache_data(here: Path, toy: Path) -> list[str]:
    return ["cache", "--model", str(toy / "model"), "--data", str(here / "none.jsonl")]


@case("store", "cache", "a model that is not there")
def _cache_model(here: Path, toy: Path) -> list[str]:
    return ["cache", "--model", str(here / "none"), "--data", str(toy / "pairs.jsonl")]


# --- Reports


def _report(what: str, spoil: Callable[[Path], object]) -> None:
    def make(here: Path, toy: Path) -> list[str]:
        shutil.copytree(toy / "run", here / "run")
        spoil(here / "run")
        return ["report", str(here / "run")]

    case("run folder", "report", what)(make)


_report("that is not there", shutil.rmtree)
_report("without settings", lambda run: (run / "config.yaml").unlink())
_report("without records", lambda run: (run / "metrics.jsonl").unlink())
_report("damaged settings", lambda run: (run / "config.yaml").write_text("[1"))
_report("settings that are a list", lambda run: (run / "config.yaml").write_text("- 1"))
_report("records of something else", lambda run: (run / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n'))
_report("records that are texts", lambda run: (run / "metrics.jsonl").write_text('{"step": 0, "loss": "x"}\n'))
_report("held-out pairs of something else", lambda run: (run / "eval_pairs.jsonl").write_text('{"step": 0}\n'))
_report("facts of something else", lambda run: (run / "facts.json").write_text('{"data": 3}'))
_report("facts that are cut short", lambda run: (run / "facts.json").write_text('{"da'))


@case("run folder", "report", "an output that cannot be written")
def _report_nowhere(here: Path, toy: Path) -> list[str]:
    (here / "file").write_text("x")
    return ["report", str(toy / "run"), "--output", str(here / "file" / "x.html")]


# --- Calls from Python


def _call(what: str) -> Callable[[Callable[[Path, Path], object]], None]:
    def keep(call: Callable[[Path, Path], object]) -> None:
        case("call", "Python", what)(lambda here, toy: lambda: call(here, toy))

    return keep


@_call("TrainConfig with beta 0")
def _bad_config(here: Path, toy: Path) -> object:
    from dpo.config import TrainConfig

    return TrainConfig(model="m", data="d", beta=0.0)


@_call("train: data that is not there")
def _bad_train(here: Path, toy: Path) -> object:
    from dpo.config import TrainConfig
    from dpo.train import train

    return train(TrainConfig(model=str(toy / "model"), data=str(here / "none.jsonl"), output=str(here / "run")))


@_call("load_preferences: rows of no known format")
def _bad_rows(here: Path, toy: Path) -> object:
    from transformers import AutoTokenizer

    from dpo.data import load_preferences

    return load_preferences([{"a": 1}], AutoTokenizer.from_pretrained(toy / "model"), eos_token_ids=[1])


@_call("pack: a prompt without tokens")
def _no_prompt(here: Path, toy: Path) -> object:
    import dpo

    return dpo.pack([dpo.Group([], [[1], [2]], [(0, 1)])])


@_call("pack: an empty completion")
def _no_completion(here: Path, toy: Path) -> object:
    import dpo

    return dpo.pack([dpo.Group([1], [[1], []], [(0, 1)])])


@_call("pack: a pair of completions that are not there")
def _no_such_pair(here: Path, toy: Path) -> object:
    import dpo

    return dpo.pack([dpo.Group([1], [[1], [2]], [(0, 2)])])


@_call("pack: no groups")
def _no_groups(here: Path, toy: Path) -> object:
    import dpo

    return dpo.pack([])


@_call("pair_loss: an index out of range")
def _bad_index(here: Path, toy: Path) -> object:
    from dpo_kernels import pair_loss

    logps = torch.zeros(2)
    return pair_loss(logps, logps, torch.tensor([0]), torch.tensor([0.5]))


@_call("pair_loss: beta 0")
def _bad_beta(here: Path, toy: Path) -> object:
    from dpo_kernels import pair_loss

    logps = torch.zeros(2)
    return pair_loss(logps, logps, torch.tensor([0]), torch.tensor([1]), beta=0.0)


@_call("linear_dpo_loss: shapes that do not fit")
def _bad_shapes(here: Path, toy: Path) -> object:
    from dpo_kernels import linear_dpo_loss

    index = torch.tensor([0]), torch.tensor([1])
    ids = torch.tensor([0, 1, 1])
    return linear_dpo_loss(torch.zeros(3, 4), torch.zeros(7, 5), torch.zeros(3, dtype=torch.long), ids, None, *index)


@_call("token_logps: integer logits")
def _bad_dtype(here: Path, toy: Path) -> object:
    from dpo_kernels import token_logps

    return token_logps(torch.zeros(3, 7, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
