"""A run that is killed, stopped or out of disk space goes on as if nothing had been, to the very same bits."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.synchronize
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpo.interrupt
import dpo.train
from dpo.cli import main
from dpo.config import TrainConfig
from dpo.errors import Stopped
from dpo.interrupt import StopSignal
from dpo.metrics import read_json_lines
from dpo.packing import Group
from dpo.steps import StepDataset, StepPlan
from tests.train.faults import Disk
from tests.train.runs import result, same, words, write_small
from tests.train.toy import Groups, random_groups


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_small(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with Disk(folder) as disk:
        main(words(toy, folder / "run"))
    return result(folder / "run"), disk.events


def _crash_and_resume(toy: Path, folder: Path, at: int) -> tuple:
    """A run, and the reference store beside it, on a disk that dies; then once more on a sound one."""
    folder.mkdir()
    with Disk(folder, at) as disk:
        main(words(toy, folder / "run"))
    assert disk.dead
    main(words(toy, folder / "run", "--resume", "auto"))
    assert not list((folder / "run").rglob(".writing-*"))
    return result(folder / "run")


def test_runs_with_dropout_differ_by_seed(toy, undisturbed, tmp_path):
    main(words(toy, tmp_path / "run", "--seed", "1"))
    assert not same(result(tmp_path / "run"), undisturbed[0])


def test_a_crash_at_some_moments_of_a_run_costs_nothing(toy, undisturbed, tmp_path):
    whole, events = undisturbed
    for at in random.Random(0).sample(range(len(events)), 3):
        assert same(_crash_and_resume(toy, tmp_path / str(at), at), whole), events[at]


@pytest.mark.slow
def test_a_crash_at_every_write_fsync_and_rename_of_a_run_costs_nothing(toy, undisturbed, tmp_path):
    """Of the store, of the second checkpoint, and of what ends a run."""
    whole, events = undisturbed
    kinds = "write", "save", "fsync", "rename", "replace"
    tested = [k for k, event in enumerate(events) if event.split()[0] in kinds]
    places = "store", "step-2", "run/.writing-model", "finished"
    tested = [k for k in tested if any(place in events[k] for place in places)]
    assert len(tested) > 40
    for at in tested:
        assert same(_crash_and_resume(toy, tmp_path / str(at), at), whole), events[at]


def test_the_folders_of_a_full_or_read_only_disk_are_named(toy, undisturbed, tmp_path, capsys):
    events = undisturbed[1]
    at = next(k for k, event in enumerate(events) if event.startswith("save") and "step-2" in event)
    run = tmp_path / "run"
    with Disk(tmp_path, at, full=True), pytest.raises(SystemExit) as stop:
        main(words(toy, run))
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "No space left on device" in error
    assert "step-1 is whole: make room and go on with --resume auto" in error
    main(words(toy, run, "--resume", "must"))
    assert same(result(run), undisturbed[0])

    with pytest.raises(SystemExit) as stop:
        main(words(toy, Path("/proc/run"), "--reference-cache", str(tmp_path / "store")))
    assert stop.value.code == 2
    assert "--output /proc/run: expected a folder to write to, found:" in capsys.readouterr().err


def test_a_finished_run_stays_as_it_is_and_one_without_checkpoint_is_refused_where_it_must_have_one(
    toy, undisturbed, tmp_path, capsys
):
    run = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(words(toy, run, "--resume", "must"))
    assert stop.value.code == 2
    assert "--resume must: expected a checkpoint under" in capsys.readouterr().err
    main(words(toy, run))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    main(words(toy, run, "--resume", "auto"))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert "the run is finished already" in capsys.readouterr().out
    # and one that is made longer goes on as the longer run would have
    main(words(toy, run, "--resume", "auto", "--max-steps", "4"))
    main(words(toy, tmp_path / "long", "--max-steps", "4"))
    ours, theirs = result(run), result(tmp_path / "long")
    assert same((ours[0], ours[1], None), (theirs[0], theirs[1], None))


def test_other_data_or_a_damaged_checkpoint_is_refused(toy, undisturbed, tmp_path, capsys):
    run, pairs = tmp_path / "run", tmp_path / "pairs.jsonl"
    shutil.copy(toy / "pairs.jsonl", pairs)
    data = "--data", str(pairs)
    main(words(toy, run, *data))
    (run / "finished.json").unlink()
    newest = run / "checkpoints" / "step-2"

    def refused() -> str:
        with pytest.raises(SystemExit) as stop:
            main(words(toy, run, *data, "--resume", "auto"))
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    held = pairs.read_text()
    pairs.write_text(held.replace(" good", " fine", 1))
    assert "--resume: expected the same data as at" in refused()
    pairs.write_text(held)
    content = (newest / "state.safetensors").read_bytes()
    (newest / "state.safetensors").write_bytes(content[:-8])
    assert "step-2: expected state.json and state.safetensors, found:" in refused()
    (newest / "state.safetensors").write_bytes(content)
    weights = newest / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert "cannot be loaded" in refused()
    (run / "config.yaml").write_text("[1]")
    assert "config.yaml: expected the settings of a run, found a list" in refused()


def test_the_best_checkpoint_stays_and_becomes_the_model(toy, tmp_path, capsys):
    run = tmp_path / "run"
    flags = "--best-metric", "margin", "--eval-every", "1", "--max-steps", "5", "--lr", "3e-2", "--seed", "2"
    main(words(toy, run, *flags, "--save-every", "0"))
    evals = {r["step"]: r["margin"] for r in read_json_lines(run / "eval.jsonl")}
    best = max(list(evals)[1:], key=lambda step: evals[step])
    assert f"after {best} steps: model/ is that one" in capsys.readouterr().out
    main(words(toy, tmp_path / "short", *flags, "--max-steps", str(best), "--save-every", "0"))
    ours, theirs = result(run)[0], result(tmp_path / "short")[0]
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    stopped = tmp_path / "stopped"
    main(words(toy, stopped, *flags[:-6], "--lr", "1e-12", "--max-steps", "6", "--early-stop", "2"))
    steps = [r["step"] for r in read_json_lines(stopped / "metrics.jsonl")]
    assert len(steps) < 6
    margins = [r["margin"] for r in read_json_lines(stopped / "eval.jsonl")][1:]
    assert len(margins) - 1 - margins.index(max(margins)) == 2


class _Augmented(Groups):
    """Data that draws from every generator when it is read."""

    def num_pairs(self, index: int) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        legacy = int(np.random.randint(97))  # noqa: NPY002
        return Group([random.randrange(97), legacy, int(torch.randint(97, ()))], [[1], [2]], [(0, 1)])


def test_what_data_workers_draw_depends_on_seed_and_step_only(toy, tmp_path):
    def drawn(workers: int, start: int, seed: int = 0) -> list[list[int]]:
        steps = StepDataset(_Augmented(random_groups(6)), StepPlan(groups_per_step=1, seed=seed))
        config = TrainConfig(model="", data="", data_workers=workers)
        state = torch.get_rng_state()
        loader = dpo.train._loader(config, steps, start, torch.device("cpu"))
        found = [step.bins[0].batch.input_ids.flatten().tolist() for step in loader]
        assert torch.equal(torch.get_rng_state(), state)
        return found

    whole = drawn(1, 0)
    assert drawn(2, 0) == whole
    assert drawn(2, 3) == whole[3:]
    assert drawn(1, 0, seed=1) != whole
    assert len({tuple(row) for row in whole}) == 6


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--best-metric", "loss"), "--best-metric: expected --eval-data or --eval-fraction beside it"),
        (("--early-stop", "3"), "--early-stop: expected --best-metric beside it"),
    ],
    ids=str,
)
def test_what_needs_held_out_data_says_so(toy, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--model", str(toy / "model"), "--data", "x", "--output", str(tmp_path / "run"), *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["forward_backward", "evaluate", "draw_curves"])
def test_signals_save_first(toy, undisturbed, tmp_path, monkeypatch, capsys, number, moment):
    run = tmp_path / "run"
    work, calls, before = getattr(dpo.train, moment), [], signal.getsignal(number)

    def interrupted(*args: object) -> object:
        calls.append(moment)
        if len(calls) == {"forward_backward": 2, "evaluate": 2, "draw_curves": 1}[moment]:
            os.kill(os.getpid(), number)
        return work(*args)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.train, moment, interrupted)
        if moment == "draw_curves":  # the run is over: it ends as it would have
            main(words(toy, run, "--save-every", "0"))
        else:
            with pytest.raises(SystemExit) as stop:
                main(words(toy, run, "--save-every", "0"))
            assert stop.value.code == 128 + number
            message = f"stopped by {number.name}; checkpoint of step 2 saved; go on with --resume auto"
            assert message in capsys.readouterr().err
    main(words(toy, run, "--save-every", "0", "--resume", "auto"))
    assert same(result(run), undisturbed[0])
    assert signal.getsignal(number) is before


def test_a_second_signal_stops_at_once():
    def twice() -> None:
        with StopSignal():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()


def test_a_signal_that_comes_while_the_ranks_ask_is_kept(monkeypatch):
    def gathered(value: int | None) -> list[int | None]:
        if value is None:
            os.kill(os.getpid(), signal.SIGTERM)
        return [value, None]

    monkeypatch.setattr(dpo.interrupt, "gathered", gathered)
    with StopSignal() as stop:
        assert not stop.asked()  # the other rank did not hear of it
        assert stop.asked()


def test_a_signal_sent_to_all_ranks_is_one_signal(monkeypatch):
    """The other rank's comes first, and torchrun passes the signal on to this one as well."""
    monkeypatch.setattr(dpo.interrupt, "gathered", lambda value: [value, signal.SIGTERM])
    with StopSignal() as stop:
        assert stop.asked()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped, match="stopped by SIGTERM; all saved"):
            stop.check("all saved")


def _hold(path: Path, ready: multiprocessing.synchronize.Event) -> None:
    with path.open("a") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        ready.set()
        time.sleep(600)


def test_a_second_process_is_refused(toy, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    processes = multiprocessing.get_context("fork")
    ready = processes.Event()
    holder = processes.Process(target=_hold, args=(run / ".lock", ready))
    holder.start()
    try:
        assert ready.wait(60)
        with pytest.raises(SystemExit) as stop:
            main(words(toy, run))
    finally:
        holder.kill()
        holder.join()
    assert stop.value.code == 2
    assert "expected no other process, found one that trains into it" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == [".lock"]
