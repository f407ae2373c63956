"""Bad input: models, weights that are not numbers, tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.errors.case import case, score_words, train_words

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
