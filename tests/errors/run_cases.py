"""Bad input: checkpoints, adapters, the store, run folders, library calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from tests.errors.case import case, train_words

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
