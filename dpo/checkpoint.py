"""The run folder: opened once, written aside and renamed, never written over by accident."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from dpo.adapters import adapter_of, save_adapter
from dpo.config import TrainConfig, to_yaml
from dpo.errors import UserError

# What may differ between a run and its continuation: how long, how often, how much memory; never what is computed.
_FREE = {
    "config", "resume", "overwrite", "output", "epochs", "max_steps", "eval_data", "eval_split", "eval_every",
    "save_every", "keep_checkpoints", "log_every", "token_budget", "share_prefix", "padded", "check_sharing", "device",
    "head_plan", "head_workspace_mb", "kernel_backend", "gradient_checkpointing", "reference", "two_phase",
    "log_to", "sample_prompts", "samples_per_prompt", "sample_tokens", "sample_temperature",
    "push_to_hub", "hub_private",
    "data_workers", "max_skipped", "trust_remote_code", "max_bad_fraction",
}  # fmt: skip


def find_run(config: TrainConfig) -> Path | None:
    """Checks that the run folder may be used; touches nothing.

    Returns:
        the newest checkpoint to go on from, or None to start from the beginning.
    Raises:
        UserError: the folder is in use and neither --resume nor --overwrite says what to do with it.
    """
    run = Path(config.output)
    started = (run / "config.yaml").exists()
    if run.exists() and not run.is_dir():
        raise UserError(f"--output {run}: expected a folder, found a file")
    if config.resume and config.overwrite:
        raise UserError("--resume: expected without --overwrite, found both")
    occupied = run.is_dir() and any(run.iterdir())
    if occupied and not started:
        raise UserError(f"--output {run}: expected a new or empty folder or a run, found other files")
    if occupied and not (config.resume or config.overwrite):
        raise UserError(f"--output {run}: expected a new or empty folder (or --resume, --overwrite), found a run")
    checkpoint = newest_checkpoint(run) if config.resume else None
    if checkpoint is not None:
        _check_same(config, yaml.safe_load((run / "config.yaml").read_text()))
    return checkpoint


def start_run(config: TrainConfig) -> Path:
    """Makes the run folder, empty unless the run goes on, and writes `config.yaml`. Call `find_run` first."""
    run = Path(config.output)
    try:
        if config.overwrite and run.is_dir():
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
        write_text(run / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(f"--output {run}: expected a folder to write to, found: {error}") from error
    return run


def _check_same(config: TrainConfig, before: Mapping[str, Any]) -> None:
    for name, value in asdict(config).items():
        if name not in _FREE and before.get(name, value) != value:
            raise UserError(
                f"--{name.replace('_', '-')}: expected {before[name]} as in the run to resume, found {value}"
            )


def write_text(path: Path, text: str) -> None:
    """Writes a file aside and renames it into place."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of the latest step, if there is one."""
    found = sorted((run / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    return found[-1] if found else None


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Writes model (its adapter, where one trains) and tokenizer for plain Transformers and peft, aside first: a folder
    that is there is whole."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    _write_model(aside, model)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def _write_model(folder: Path, model: Any) -> None:
    if adapter_of(model) is not None:
        save_adapter(folder, model)
        return
    # the run's attention and cache settings are not the checkpoint's
    attention, cache = model.config._attn_implementation, model.config.use_cache
    model.set_attn_implementation("eager")
    model.config._attn_implementation_internal, model.config.use_cache = None, True
    try:
        model.save_pretrained(folder)
    finally:
        model.config.use_cache = cache
        model.set_attn_implementation(attention)


def save_checkpoint(run: Path, step: int, model: Any, tokenizer: Any, parts: Mapping[str, Any], keep: int) -> Path:
    """Writes checkpoints/step-N: model, tokenizer, generator, and the state of the parts; keeps the newest `keep`."""
    folder = run / "checkpoints" / f"step-{step}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f"writing-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    save_model(aside / "model", model, tokenizer)
    states = {name: part.state_dict() for name, part in parts.items()}
    torch.save({"step": step, "parts": states, "rng": torch.get_rng_state()}, aside / "state.pt")
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    others = sorted(folder.parent.glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    for old in others[:-keep]:
        shutil.rmtree(old)
    return folder


def load_state(checkpoint: Path, parts: Mapping[str, Any]) -> int:
    """Restores the parts and the generator; returns the steps done. The model is loaded from checkpoint/model."""
    state = torch.load(checkpoint / "state.pt", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    torch.set_rng_state(state["rng"])
    return int(state["step"])
