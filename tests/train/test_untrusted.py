"""Files from strangers: nothing in them is run, and no path leads out of where they lie."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.cli import main
from dpo.sharded import load_parts
from tests.train.toy import write_toy

ROOT = Path(__file__).resolve().parents[2]


class _Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), pairs=6)


def _words(toy: Path, run: Path, *flags: str) -> list[str]:
    words = ["train", "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), "--output", str(run)]
    return [*words, "--pairs-per-step", "2", "--save-every", "1", "--warmup-steps", "1", "--no-check-sharing", *flags]


def _refused(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("dpo: ")
    return error


def test_the_bomb_goes_off_when_it_is_unpickled(tmp_path):
    pickle.loads(pickle.dumps(_Bomb(tmp_path / "boom")))
    assert (tmp_path / "boom").exists()


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors"])
@pytest.mark.parametrize("flag", ["--model", "--reference-model"])
def test_a_model_that_bears_a_pickle_is_refused(toy, tmp_path, capsys, weights, flag):
    bad = tmp_path / "bad"
    shutil.copytree(toy / "model", bad)
    (bad / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Bomb(tmp_path / "boom")}, bad / weights)
    error = _refused(capsys, *_words(toy, tmp_path / "run", flag, str(bad)))
    assert f"{flag} {bad}: " in error
    assert "cannot be loaded" in error or "found a pickle that holds more: it is not loaded" in error
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("file", ["state.safetensors", "state.json", "model/model.safetensors", "model/tokenizer.json"])
def test_a_checkpoint_that_bears_a_pickle_is_refused(toy, tmp_path, capsys, file):
    run = tmp_path / "run"
    main(_words(toy, run, "--max-steps", "2"))
    (run / "finished.json").unlink()
    (run / "checkpoints" / "step-1" / file).write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    (run / "checkpoints" / "step-1" / "state.pt").write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    capsys.readouterr()
    assert "step-1" in _refused(capsys, *_words(toy, run, "--max-steps", "2", "--resume", "must"))
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("file", ["part.safetensors", ".metadata"])
def test_parts_of_a_checkpoint_that_are_pickles_are_not_read(tmp_path, file):
    (tmp_path / "sharded").mkdir()
    save_file({"weights/a": torch.ones(2)}, tmp_path / "sharded" / "good.safetensors")
    (tmp_path / "sharded" / file).write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    with contextlib.suppress(ValueError):
        load_parts(tmp_path, None)
    assert not (tmp_path / "boom").exists()


def test_a_store_that_bears_a_pickle_is_not_used(toy, tmp_path):
    cache = "--reference-cache", str(tmp_path / "store")
    main(_words(toy, tmp_path / "a", *cache))
    (unit,) = (tmp_path / "store").glob("*/*.safetensors")
    unit.write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    (unit.parent / f"{'0' * 32}.safetensors").symlink_to(toy / "model" / "model.safetensors")
    (tmp_path / "store" / "digests.json").write_bytes(pickle.dumps(_Bomb(tmp_path / "boom")))
    main(_words(toy, tmp_path / "b", *cache))
    assert not (tmp_path / "boom").exists()
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in "ab")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("name", ["../weights.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_of_weights_stays_in_its_folder(toy, tmp_path, capsys, name):
    bad = tmp_path / "bad"
    shutil.copytree(toy / "model", bad)
    weights = load_file(bad / "model.safetensors")
    (bad / "model.safetensors").unlink()
    save_file(weights, tmp_path / "weights.safetensors", metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, name)}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    error = _refused(capsys, *_words(toy, tmp_path / "run", "--model", str(bad)))
    assert f"model.safetensors.index.json: expected names of files beside it, found {name!r}" in error


def test_code_that_comes_with_a_model_is_not_run_unasked(toy, tmp_path, capsys):
    bad = tmp_path / "bad"
    shutil.copytree(toy / "model", bad)
    config = json.loads((bad / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (bad / "config.json").write_text(json.dumps(config))
    (bad / "code.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'boom')!r}).touch()\n")
    error = _refused(capsys, *_words(toy, tmp_path / "run", "--model", str(bad)))
    assert "brings code of its own: read it, then allow it with --trust-remote-code" in error
    assert not (tmp_path / "boom").exists()


def test_no_source_file_reads_a_pickle_or_unpacks_an_archive():
    banned = re.compile(
        r"\btorch\.load\(|\bpickle\.loads?\(|\bUnpickler\b|allow_pickle=True|\bjoblib\b|\bdill\b"
        r"|\btarfile\b|\bzipfile\b|\bunpack_archive\b"
    )
    files = [*(ROOT / "dpo").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(files) > 30
    assert [str(file) for file in files if banned.search(file.read_text(encoding="utf-8"))] == []
