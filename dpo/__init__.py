"""Direct Preference Optimization with one packed, prefix-shared forward pass and fused kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpo.model import LogPs, shared_logps
    from dpo.packing import Group, PackedBatch, pack
    from dpo.trl import patch_trl

__version__ = "0.1.0"
__all__ = ["Group", "LogPs", "PackedBatch", "__version__", "pack", "patch_trl", "shared_logps"]

_HOME = {
    "Group": "dpo.packing",
    "PackedBatch": "dpo.packing",
    "pack": "dpo.packing",
    "patch_trl": "dpo.trl",
    "LogPs": "dpo.model",
    "shared_logps": "dpo.model",
}


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import: only when something of theirs is asked for
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
