"""The run folder: one process at a time, every file written aside and renamed, nothing written over by accident.

config.yaml, metrics.jsonl, eval.jsonl, model/, finished.json
checkpoints/step-N/model/                       weights and tokenizer, for plain Transformers
checkpoints/step-N/state.{json,safetensors}     optimizer, generators, position, and all else that goes on
checkpoints/best.json                           the step of the best evaluation, where --best-metric asks for it
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from dpo.adapters import adapter_of, save_adapter
from dpo.config import TrainConfig, to_yaml
from dpo.distributed import gathered, is_main, on_main
from dpo.durable import WRITE_ERRORS, new_folder, remove_folder, sweep, write_text
from dpo.errors import UserError
from dpo.parallel import is_sharded
from dpo.sharded import part_weights, whole_weights
from dpo.statefile import BadState, load_state, save_state

# What may differ between a run and its continuation: how long, how often, how much memory; never what is computed.
_FREE = {
    "config", "resume", "overwrite", "output", "epochs", "max_steps", "eval_data", "eval_split", "eval_every",
    "save_every", "keep_checkpoints", "log_every", "token_budget", "share_prefix", "padded", "check_sharing", "device",
    "head_plan", "head_workspace_mb", "kernel_backend", "gradient_checkpointing", "reference", "reference_cache",
    "log_to", "sample_prompts", "samples_per_prompt", "sample_tokens", "sample_temperature", "push_to_hub",
    "hub_private", "two_phase", "parallel", "data_workers", "max_skipped", "trust_remote_code", "max_bad_fraction",
}  # fmt: skip
_LOCK, _STEP = ".lock", re.compile(r"step-(\d+)")


class Stateful(Protocol):
    """A part of a run whose state goes into checkpoints: an optimizer, a loss with a running baseline, ..."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def find_run(config: TrainConfig) -> Path | None:
    """Checks that the run folder may be used; touches nothing.

    Returns:
        the newest checkpoint to go on from, or None to start from the beginning.
    Raises:
        UserError: the folder is in use and neither --resume nor --overwrite says what to do with it.
    """
    run, resume = Path(config.output), config.resume != "never"
    started = (run / "config.yaml").exists()
    if run.exists() and not run.is_dir():
        raise UserError(f"--output {run}: expected a folder, found a file")
    if resume and config.overwrite:
        raise UserError("--resume: expected without --overwrite, found both")
    occupied = run.is_dir() and any(not path.name.startswith(".") for path in run.iterdir())
    if occupied and not started:
        raise UserError(f"--output {run}: expected a new or empty folder or a run, found other files")
    if occupied and not (resume or config.overwrite):
        raise UserError(f"--output {run}: expected a new or empty folder (or --resume auto, --overwrite), found a run")
    checkpoint = newest_checkpoint(run) if resume else None
    if config.resume == "must" and checkpoint is None and finished_steps(run) is None:
        raise UserError(f"--resume must: expected a checkpoint under {run}, found none")
    if resume and started:
        _check_same(config, _read_config(run))
    return checkpoint


@contextmanager
def open_run(config: TrainConfig, checkpoint: Path | None) -> Iterator[Path]:
    """Makes the run folder, empty unless the run goes on, takes its lock, and writes `config.yaml`; rank 0 does.

    Args:
        checkpoint: what `find_run` returned.
    Raises:
        UserError: another process has the folder, or it cannot be written.
    """
    with ExitStack() as stack:
        yield on_main(lambda: stack.enter_context(_open_run(config, checkpoint)))


@contextmanager
def _open_run(config: TrainConfig, checkpoint: Path | None) -> Iterator[Path]:
    run = Path(config.output)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / _LOCK).open("a")
    except OSError as error:
        raise UserError(f"--output {run}: expected a folder to write to, found: {error}") from error
    with lock:
        _take(lock, run)
        if find_run(config) != checkpoint:
            raise UserError(f"--output {run}: expected no other process, found that one has just written to it")
        with writing(run):
            if config.overwrite:
                _empty(run)
            for folder in (run, run / "checkpoints"):
                sweep(folder)
            (run / "finished.json").unlink(missing_ok=True)
            write_text(run / "config.yaml", to_yaml(config))
        yield run


def _take(lock: Any, run: Path) -> None:
    # a record lock: gone with the process however it ends, and not inherited by data workers that outlive it
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"--output {run}: expected no other process, found one that trains into it") from None


def _empty(run: Path) -> None:
    # config.yaml last: without it, what a crash leaves would not be known as a run
    for path in sorted(run.iterdir(), key=lambda path: path.name == "config.yaml"):
        if path.name == _LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def writing(run: Path) -> Iterator[None]:
    """Turns what a full or read-only disk raises into one line that says what is safe."""
    try:
        yield
    except WRITE_ERRORS as error:
        newest = newest_checkpoint(run)
        safe = f"{newest.name} is whole: make room and go on with --resume auto" if newest else "there is no checkpoint"
        raise UserError(f"--output {run}: cannot be written: {' '.join(str(error).split())}; {safe}") from error


def _read_config(run: Path) -> Mapping[str, Any]:
    path = run / "config.yaml"
    try:
        held = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: expected the settings of a run, found: {' '.join(str(error).split())}") from error
    if not isinstance(held, dict):
        raise UserError(f"{path}: expected the settings of a run, found a {type(held).__name__}")
    return held


def _check_same(config: TrainConfig, before: Mapping[str, Any]) -> None:
    for name, value in asdict(config).items():
        if name not in _FREE and before.get(name, value) != value:
            raise UserError(
                f"--{name.replace('_', '-')}: expected {before[name]} as in the run to resume, found {value}"
            )


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [(int(m[1]), path) for path in (run / "checkpoints").glob("step-*") if (m := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the latest step, if there is one."""
    found = checkpoints(run)
    return found[-1] if found else None


def finished_steps(run: Path) -> int | None:
    """How many steps a finished run was to have; None for one that did not end."""
    if not (run / "model").is_dir():
        return None
    try:
        return int(json.loads((run / "finished.json").read_text())["steps"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes model (its adapter, where one trains) and tokenizer for plain Transformers and peft, aside first: a folder
    that is there is whole. All ranks call it; rank 0 writes."""
    weights = whole_weights(model) if is_sharded(model) else None
    if is_main():
        with new_folder(folder) as aside:
            _write_model(aside, model, weights)
            tokenizer.save_pretrained(aside)


def _write_model(folder: Path, model: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    if adapter_of(model) is not None:
        save_adapter(folder, model, weights)
        return
    # the run's attention and cache settings are not the checkpoint's
    attention, cache = model.config._attn_implementation, model.config.use_cache
    model.set_attn_implementation("eager")
    model.config._attn_implementation_internal, model.config.use_cache = None, True
    try:
        model.save_pretrained(folder, **({} if weights is None else {"state_dict": weights}))
    finally:
        model.config.use_cache = cache
        model.set_attn_implementation(attention)


def save_checkpoint(
    run: Path, step: int, model: Any, tokenizer: Any, state: Mapping[str, Any], *, keep: int, best: int | None = None
) -> Path:
    """Writes checkpoints/step-N and then lets the oldest go. All ranks call it.

    Sharded weights and states go to checkpoints/step-N/sharded instead of model/ and state.safetensors, each rank's
    parts from that rank; an adapter is in model/ in any case.

    Args:
        state: what `load_checkpoint` gives back: tensors, numbers and strings in dicts and lists.
        keep: how many of the newest to keep.
        best: the step whose checkpoint is kept besides.
    Raises:
        UserError: the disk is full or read-only; the checkpoints before are whole.
    """
    folder = run / "checkpoints" / f"step-{step}"
    tree: dict[str, Any] = {"step": step, **state}
    in_parts = is_sharded(model) and adapter_of(model) is None
    if in_parts:
        tree["weights"] = part_weights(model)
    weights = whole_weights(model) if is_sharded(model) and not in_parts else None
    with writing(run), ExitStack() as stack:

        def begin() -> Path:
            folder.parent.mkdir(exist_ok=True)
            aside = stack.enter_context(new_folder(folder))
            if not in_parts:
                _write_model(aside / "model", model, weights)
                tokenizer.save_pretrained(aside / "model")
            return aside

        save_state(on_main(begin), tree)
        gathered(None)  # every rank has written: rank 0 may rename
    if is_main():
        _keep(run, keep, best)
    gathered(None)
    return folder


def _keep(run: Path, keep: int, best: int | None) -> None:
    folder = run / "checkpoints"
    with writing(run):
        if best is not None:
            write_text(folder / "best.json", json.dumps({"step": best}) + "\n")
        for old in checkpoints(run)[:-keep]:
            if old.name != f"step-{best}":
                remove_folder(old)


def model_folder(checkpoint: Path | None) -> str | None:
    """Where the weights of a checkpoint are to be loaded from; None: from --model, see `load_checkpoint`."""
    folder = None if checkpoint is None else checkpoint / "model"
    return str(folder) if folder is not None and folder.is_dir() else None


def load_checkpoint(checkpoint: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """The state of a checkpoint; its weights are loaded from checkpoint/model, or are in the state as "weights".

    Args:
        mesh: the ranks over which the model is sharded: parts of tensors are loaded then.
    Raises:
        UserError: it is damaged, or of another version.
    """
    try:
        state = load_state(checkpoint, mesh)
    except BadState as error:
        raise UserError(f"{checkpoint}: {error}") from error
    if not isinstance(state, dict) or f"step-{state.get('step')}" != checkpoint.name:
        raise UserError(f"{checkpoint}: expected the state of {checkpoint.name}, found that of another step")
    if model_folder(checkpoint) is None and "weights" not in state:
        raise UserError(f"{checkpoint}: expected its weights in model/ or in its state, found neither")
    return state


def finish_run(run: Path, steps: int) -> None:
    """Marks the run as finished. Call it last."""
    if not is_main():
        return
    with writing(run):
        write_text(run / "finished.json", json.dumps({"steps": steps}) + "\n")
