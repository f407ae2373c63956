"""Checkpoints: what is saved comes back bit by bit, and a disk that dies or fills up at any moment costs nothing."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaForCausalLM

from dpo.best import BestEvaluation
from dpo.checkpoint import checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from dpo.durable import sweep
from dpo.errors import UserError
from dpo.rng import random_state, restore_random_state, seed_all
from dpo.statefile import BadState, load_state, save_state
from tests.train.faults import Disk
from tests.train.toy import write_model


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(7), b.nan_to_num(7))
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    return type(a) is type(b) and (a == b or (a != a and b != b))


def test_a_state_comes_back_bit_by_bit(tmp_path):
    shared = torch.randn(4, 6)
    tree = {
        "numbers": [1, -2.5, 0.1 + 0.2, 1e-320, math.inf, math.nan, True, None, "a/b"],
        3: {"tuple": (1, (2.0, None)), "empty": {}, "list": []},
        "tensors": {"bf16": torch.randn(3).bfloat16(), "int": torch.tensor(7), "none": torch.empty(0, 2)},
        "views": [shared, shared[1:], shared.t()],
    }
    save_state(tmp_path, tree)
    assert _equal(load_state(tmp_path), tree)


def test_random_numbers_go_on_where_they_stopped(tmp_path):
    def draw() -> list[float]:
        legacy = np.random.random()  # noqa: NPY002
        return [random.random(), legacy, torch.rand(()).item(), random.gauss(0, 1), torch.randn(3)[2].item()]

    seed_all(3, 1)
    draw()
    save_state(tmp_path, random_state())
    first = draw()
    seed_all(4)
    assert draw() != first
    restore_random_state(load_state(tmp_path))
    assert draw() == first


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("state.json", b"{"),
        ("state.json", b"[]"),
        ("state.json", b'{"format": 99, "state": null}'),
        ("state.json", b'{"format": 1, "state": {"tensor": "nowhere"}}'),
        ("state.json", b'{"format": 1, "state": {"a": 1, "b": 2}}'),
        ("state.json", b'{"format": 1, "state": {"dict": [[[1], 2]]}}'),
        ("state.json", b'{"format": 1}'),
        ("state.safetensors", b""),
        ("state.safetensors", pickle.dumps({"a": 1})),
        ("state.safetensors", None),
    ],
    ids=str,
)
def test_a_damaged_state_is_refused(tmp_path, name, content):
    save_state(tmp_path, {"a": torch.ones(3)})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadState):
        load_state(tmp_path)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("checkpoint") / "model")
    return LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def _save(run: Path, step: int, network: tuple[Any, Any], best: int | None = None) -> None:
    model, tokenizer = network
    with torch.no_grad():
        model.lm_head.weight[0, 0] = step
    state = {"parts": {"optimizer": {"state": {0: {"square_avg": torch.full((50,), float(step))}}}}}
    save_checkpoint(run, step, model, tokenizer, state, keep=1, best=best)


def _check(checkpoint: Path) -> int:
    """The step of a checkpoint whose every part is that step's."""
    step = load_checkpoint(checkpoint)["step"]
    average = load_checkpoint(checkpoint)["parts"]["optimizer"]["state"][0]["square_avg"]
    assert torch.equal(average, torch.full((50,), float(step)))
    assert load_file(checkpoint / "model" / "model.safetensors")["lm_head.weight"][0, 0] == step
    LlamaForCausalLM.from_pretrained(checkpoint / "model")
    AutoTokenizer.from_pretrained(checkpoint / "model")
    return step


def test_the_newest_and_the_best_stay(tmp_path, network):
    for step, best in ((1, 1), (2, 1), (3, 1), (4, 4), (10, 4)):
        _save(tmp_path, step, network, best)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-4", "step-10"]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 4}
    assert _check(tmp_path / "checkpoints" / "step-10") == 10
    (tmp_path / "checkpoints" / "step-x").mkdir()
    (tmp_path / "checkpoints" / "step-10").rename(tmp_path / "checkpoints" / "step-11")
    with pytest.raises(UserError, match="step-11: expected the state of step-11, found that of another step"):
        load_checkpoint(tmp_path / "checkpoints" / "step-11")


def _events(tmp_path: Path, network: tuple[Any, Any]) -> int:
    run = tmp_path / "counted"
    run.mkdir()
    _save(run, 1, network)
    with Disk(run) as disk:
        _save(run, 2, network)
    kinds = {event.split()[0] for event in disk.events}
    assert kinds == {"write", "save", "fsync", "rename", "unlink", "rmdir", "mkdir"}
    return len(disk.events)


def test_a_crash_at_any_write_fsync_rename_or_delete_leaves_a_whole_checkpoint(tmp_path, network):
    events = _events(tmp_path, network)
    assert events > 30
    found = []
    for at in range(events):
        run = tmp_path / f"crash-{at}"
        run.mkdir()
        _save(run, 1, network)
        with Disk(run, at) as disk:
            _save(run, 2, network)
        assert disk.dead
        newest = newest_checkpoint(run)
        assert newest is not None
        found.append(_check(newest))
        sweep(run / "checkpoints")
        assert all(path.name.startswith("step-") for path in (run / "checkpoints").iterdir())
        _save(run, 3, network)
        assert [_check(path) for path in checkpoints(run)] == [3]
    assert found == sorted(found)
    assert set(found) == {1, 2}


def _error_of(function: Callable[[], None]) -> str:
    try:
        function()
    except UserError as error:
        return str(error)
    return ""


def test_a_disk_that_is_full_at_any_moment_is_told_in_one_line_and_costs_nothing(tmp_path, network):
    events = _events(tmp_path, network)
    for at in range(0, events, 3):
        run = tmp_path / f"full-{at}"
        run.mkdir()
        _save(run, 1, network)
        error = ""
        with Disk(run, at, full=True) as disk:
            error = _error_of(lambda run=run: _save(run, 2, network))
        if error:  # deleting the old one needs no room
            assert "No space left on device" in error
            assert "is whole: make room and go on with --resume auto" in error
            assert "\n" not in error
        newest = newest_checkpoint(run)
        assert newest is not None
        _check(newest)
        assert not list((run / "checkpoints").glob(".writing-*")), disk.events[at]


def test_the_best_evaluation():
    best = BestEvaluation("loss", patience=2)
    taken = [best.take(step, {"loss": loss}) for step, loss in enumerate([0.1, 0.7, 0.6, 0.6, math.nan])]
    assert taken == [False, True, True, False, False]
    assert (best.step, best.value, best.stop) == (2, 0.6, True)
    again = BestEvaluation("loss", patience=2)
    again.load_state_dict(best.state_dict())
    assert again.stop
    assert again.take(9, {"loss": 0.5})
    assert not again.stop
    accuracy = BestEvaluation("accuracy")
    assert [accuracy.take(k, {"accuracy": a}) for k, a in ((1, 0.5), (2, 0.7), (3, 0.6))] == [True, True, False]
    assert not accuracy.stop
