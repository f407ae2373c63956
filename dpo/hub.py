"""The model card, written beside every trained model, and --push-to-hub."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo.charts import number
from dpo.config import TrainConfig, defaults_of
from dpo.console import say
from dpo.durable import write_text
from dpo.errors import UserError
from dpo.report import Run, read_run

_MEASURES = {
    "loss": "loss",
    "accuracy": "reward accuracy",
    "margin": "reward margin",
    "chosen_reward": "chosen reward",
    "rejected_reward": "rejected reward",
    "chosen_logps_per_token": "log-prob of chosen tokens",
    "rejected_logps_per_token": "log-prob of rejected tokens",
    "kl": "KL to the reference, nats a sample",
}
_PATHS = ("model", "data", "eval_data", "reference_model", "sample_prompts")
# where a run lives, and how much of it is kept, is of no interest to a reader of the card
_LEFT_OUT = ("output", "resume", "overwrite", "push_to_hub", "hub_private", "log_to", "log_every", "data_workers")


def write_card(folder: Path) -> Path:
    """Writes model/README.md, and the curves beside it, from what the run folder holds. Tells no local path."""
    run = read_run(folder)
    if (folder / "curves.png").exists():
        shutil.copyfile(folder / "curves.png", folder / "model" / "curves.png")
    path = folder / "model" / "README.md"
    write_text(path, card(run))
    return path


def card(run: Run) -> str:
    """The card: metadata for the hub, then what a reader wants to know."""
    base, data = (run.settings.get(name) for name in ("model", "data"))
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference-optimization", "fused-dpo"],
    }
    metadata |= {"base_model": base} if _is_hub_id(base) else {}
    metadata |= {"datasets": [data]} if _is_hub_id(data) else {}
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---",
        f"# {_public(base)}, trained on preferences",
        f"Direct Preference Optimization of {_named(base)} on {_named(data)}, "
        f"{len(run.steps)} steps, with [Fused DPO](https://pypi.org/project/fused-dpo/).",
        _usage(run),
        _results(run),
        "![Curves of the run](curves.png)" if (run.folder / "curves.png").exists() else "",
        _warnings(run),
        _data(run),
        _training(run),
        "## Citation\n\nRafailov et al., *Direct Preference Optimization: Your Language Model is Secretly a Reward "
        "Model*, NeurIPS 2023, arXiv:2305.18290.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_hub_id(name: object) -> bool:
    return (
        isinstance(name, str) and name.count("/") <= 1 and not Path(name).exists() and not name.startswith((".", "~"))
    )


def _public(name: object) -> str:
    """A hub id as it is; of a local path only its last part."""
    return str(name) if _is_hub_id(name) else Path(str(name)).name


def _named(name: object) -> str:
    return f"[{name}](https://huggingface.co/{name})" if _is_hub_id(name) else f"`{_public(name)}`"


def _usage(run: Run) -> str:
    name = run.settings.get("push_to_hub") or run.folder.resolve().name
    return (
        f'```python\nfrom transformers import pipeline\n\ngenerate = pipeline("text-generation", model="{name}")\n```'
    )


def _results(run: Run) -> str:
    if not run.evals:
        return ""
    first, last = run.evals[0], run.evals[-1]
    rows = [
        (label, number(first[name]), _with_error(last, name))
        for name, label in _MEASURES.items()
        if first.get(name) is not None and last.get(name) is not None
    ]
    title = f"## Held-out results\n\n{last['pairs']} pairs; log-probs in nats a token.\n\n"
    return title + _table(("", f"after {first['step']} steps", f"after {last['step']} steps"), rows)


def _with_error(record: Mapping[str, Any], name: str) -> str:
    error = record.get(f"{name}_se")
    return number(record[name]) + (f" ± {number(error)}" if error else "")


def _warnings(run: Run) -> str:
    lines = [f"- Step {w['step']}: {w['message']}." for w in run.warnings]
    return "## Warnings of the run\n\n" + "\n".join(lines) if lines else ""


def _data(run: Run) -> str:
    rows = [
        (label, _public(run.settings.get(key) or "part of --data"), part["format"], part["prompts"], part["pairs"])
        for name, key, label in (("train", "data", "training"), ("eval", "eval_data", "held out"))
        if (part := run.facts.get("data", {}).get(name))
    ]
    return "## Data\n\n" + _table(("", "source", "format", "prompts", "pairs"), rows) if rows else ""


def _training(run: Run) -> str:
    defaults = defaults_of(TrainConfig)
    settings = {name: value for name, value in run.settings.items() if name not in _LEFT_OUT}
    shown = {name: _public(v) if name in _PATHS and v is not None else v for name, v in settings.items()}
    changed = [(f"`{name}`", f"`{shown[name]}`") for name, v in settings.items() if defaults.get(name, ...) != v]
    rest = ", ".join(f"{name} {shown[name]}" for name, v in settings.items() if defaults.get(name, ...) == v)
    device, versions = run.facts.get("device", {}), run.facts.get("versions", {})
    machine = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    parts = [
        "## Training",
        _table(("setting", "value"), changed),
        f"At their defaults: {rest}.",
        f"Trained on {device['name']} with {machine}." if device else "",
    ]
    return "\n\n".join(part for part in parts if part)


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    escaped = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in escaped])


def check_push(config: TrainConfig) -> None:
    """Finds out before training what would make --push-to-hub fail after it. Asks nobody.

    Raises UserError for a name that the hub does not take, for no token, and where the hub is switched off.
    """
    if config.push_to_hub is None:
        return
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    flag = f"--push-to-hub {config.push_to_hub}"
    try:
        validate_repo_id(config.push_to_hub)
    except HFValidationError as error:
        raise UserError(f"{flag}: expected NAMESPACE/NAME, found: {' '.join(str(error).split())}") from error
    if constants.HF_HUB_OFFLINE:
        raise UserError(f"{flag}: expected the hub within reach, found HF_HUB_OFFLINE=1")
    if get_token() is None:
        raise UserError(f"{flag}: expected a token (hf auth login, or HF_TOKEN), found none")


def push(config: TrainConfig, folder: Path) -> str | None:
    """Uploads the trained model with its card, where --push-to-hub asks for it; returns its address.

    Raises UserError when the hub refuses; the model stays in the run folder.
    """
    if config.push_to_hub is None:
        return None
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        repo = api.create_repo(config.push_to_hub, private=config.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder / "model", commit_message="Upload a model trained with Fused DPO"
        )
    # the network, the token or the hub, in any of several libraries' exceptions; the model is safe
    except Exception as error:
        raise UserError(
            f"--push-to-hub {config.push_to_hub}: the model is in {folder / 'model'}, but the upload failed: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    say(f"pushed to {repo}")
    return str(repo)
