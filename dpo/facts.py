"""facts.json of a run folder: model, data and machine, for the report and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo.data import PreferenceData
from dpo.durable import write_text
from dpo.inputs import Policy
from dpo.machine import describe_device, versions

_COUNTS = ("source", "format", "rows", "longest_prompt", "longest_completion", "ties")


def write_facts(run: Path, policy: Policy, data: PreferenceData, eval_data: PreferenceData | None) -> None:
    """Writes what the run is about, and where it runs."""
    parameters = list(policy.model.parameters())
    facts = {
        "model": {
            "class": type(policy.model).__name__,
            "parameters": sum(p.numel() for p in parameters),
            "trainable": sum(p.numel() for p in parameters if p.requires_grad),
        },
        "data": {name: _described(part) for name, part in (("train", data), ("eval", eval_data)) if part is not None},
        "versions": versions(),
        "device": describe_device(policy.device),
    }
    write_text(run / "facts.json", json.dumps(facts, indent=2) + "\n")


def _described(data: PreferenceData) -> dict[str, Any]:
    report = data.report
    found = {name: getattr(report, name) for name in _COUNTS}
    dropped = {reason: str(what) for reason, what in report.dropped.items()}
    return found | {"prompts": len(data), "pairs": data.total_pairs, "dropped": dropped}
