"""--log-to: what reaches TensorBoard, Weights & Biases and trackio from a run."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
import types

import pytest

import dpo.trackers
from dpo.cli import main
from dpo.metrics import read_json_lines
from dpo.trackers import chosen_trackers
from tests.train.toy import write_model
from tests.watch.runs import even, longer, train, write_rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", even, 16)
    write_rows(folder / "longer.jsonl", longer)
    write_rows(folder / "held_out.jsonl", even, 5, seed=1)
    return folder


def go(toy, output, *flags):
    held_out = "--eval-data", str(toy / "held_out.jsonl")
    return train(toy / "model", toy / "pairs.jsonl", output, *held_out, "--max-steps", "2", *flags)


class Service(types.ModuleType):
    """Stands for wandb or trackio: keeps what it is given."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.started: list[dict] = []
        self.logged: list[tuple[int, dict]] = []
        self.finished = 0

    def init(self, **options):
        self.started.append(options)

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1

    def Histogram(self, values):
        return ("histogram", values)

    def Table(self, columns, data):
        return ("table", columns, data)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_gets_every_record_once_in_order(toy, tmp_path, monkeypatch, name):
    service = Service(name)
    monkeypatch.setitem(sys.modules, name, service)
    run = go(toy, tmp_path / "run", "--log-to", name, "--save-every", "1", "--beta", "0.2", "--epochs", "9")
    (started,) = service.started
    assert started["project"] == "fused-dpo"
    assert started["config"]["beta"] == 0.2
    assert started["resume"] == "allow"
    steps = [step for step, _ in service.logged]
    assert steps == sorted(steps)
    for kind, file in (("train", "metrics.jsonl"), ("eval", "eval.jsonl")):
        sent = {step: values for step, values in service.logged if f"{kind}/loss" in values}
        for record in read_json_lines(run / file):
            for key in ("loss", "accuracy", "margin"):
                assert sent[record["step"]][f"{kind}/{key}"] == record[key]
    assert [values["eval/margins"][0] for _, values in service.logged if "eval/margins" in values] == ["histogram"] * 2
    assert service.finished == 1
    flags = "--save-every", "1", "--beta", "0.2", "--max-steps", "3", "--epochs", "9"
    go(toy, run, "--log-to", name, *flags, "--resume", "auto")
    again = service.started[1]
    assert (again["name"], again.get("id")) == (started["name"], started.get("id"))


def test_none_switches_off_and_tensorboard_is_the_default_where_it_is(toy, tmp_path, monkeypatch):
    run = go(toy, tmp_path / "run", "--log-to", "none")
    assert not (run / "tensorboard").exists()
    config = types.SimpleNamespace(log_to=None)
    for installed in (True, False):
        monkeypatch.setattr(dpo.trackers, "_installed", lambda name, here=installed: here)
        assert chosen_trackers(config) == ["tensorboard"] * installed  # pyright: ignore[reportArgumentType]


def test_what_is_asked_for_and_missing_is_an_error_before_anything_is_loaded(toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dpo.trackers, "_installed", lambda name: False)
    for name in ("wandb", "trackio", "tensorboard"):
        with pytest.raises(SystemExit) as stop:
            go(toy, tmp_path / "run", "--log-to", name)
        assert stop.value.code == 2
        assert f"--log-to {name}: expected it installed (pip install {name})" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        go(toy, tmp_path / "run", "--log-to", "none", "wandb")
    assert "--log-to none: expected nothing beside it" in capsys.readouterr().err


def test_a_list_of_trackers_goes_through_yaml_and_back(toy, tmp_path, monkeypatch):
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, Service(name))
    run = go(toy, tmp_path / "run", "--log-to", "wandb", "trackio")
    assert "log_to:\n- wandb\n- trackio\n" in (run / "config.yaml").read_text()
    main(["train", "--config", str(run / "config.yaml"), "--output", str(tmp_path / "again")])
    assert all(len(sys.modules[name].started) == 2 for name in ("wandb", "trackio"))  # pyright: ignore[reportAttributeAccessIssue]


def test_tensorboard_holds_the_records(toy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    run = go(toy, tmp_path / "run", "--data", str(toy / "longer.jsonl"), "--max-steps", "12")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    for kind, file in (("train", "metrics.jsonl"), ("eval", "eval.jsonl")):
        for name in ("loss", "accuracy", "margin"):
            drawn = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
            records = read_json_lines(run / file)
            assert drawn == [(record["step"], pytest.approx(record[name], rel=1e-6)) for record in records]
    assert "eval/margins" in tags["histograms"]
    assert any("warnings" in tag for tag in tags["tensors"])
    assert any("settings" in tag for tag in tags["tensors"])


def test_a_tensorboard_that_goes_on_has_every_step_once(toy, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import (  # pyright: ignore[reportMissingImports]
        EventAccumulator,
    )

    run = go(toy, tmp_path / "run", "--max-steps", "4", "--save-every", "2", "--epochs", "9")
    go(toy, run, "--max-steps", "5", "--save-every", "2", "--epochs", "9", "--resume", "auto")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4]
