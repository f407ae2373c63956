"""The table of sizes in dpo/README.md: python -m tests.plan.sizes"""

from __future__ import annotations

from dpo.commands import PlanConfig
from dpo.plan_memory import plan_memory

ROWS = [
    ("1b", 1, False),
    ("1b", 1, True),
    ("1b", 8, True),
    ("8b", 1, True),
    ("8b", 8, False),
    ("8b", 8, True),
    ("70b", 16, True),
    ("70b", 32, True),
    ("70b", 64, True),
]
COLUMNS = ("parameters", "gradients", "optimizer", "gathered", "activations", "head", "peak")


def sizes() -> str:
    """The table in Markdown, GiB on each rank."""
    lines = [
        f"| model | ranks | | {' | '.join(COLUMNS)} |",
        "|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for model, ranks, checkpointing in ROWS:
        found = plan_memory(PlanConfig(model=model, ranks=ranks, gradient_checkpointing=checkpointing))
        mode = ", ".join(filter(None, ("" if ranks == 1 else found.parallel, "checkpointing" if checkpointing else "")))
        numbers = " | ".join(f"{getattr(found, name) / 2**30:.1f}" for name in COLUMNS)
        lines.append(f"| {model.upper()} | {ranks} | {mode} | {numbers} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(sizes())
