"""State of a run as files without pickle: tensors in safetensors, everything around them in JSON.

A state is a tree of dicts, lists, tuples, strings, numbers, booleans, None and tensors, as `state_dict()` of optimizers
and others return it. What is read back is equal bit by bit, keys and tuples included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dpo.distributed import is_main
from dpo.sharded import load_parts, save_parts, spread_like

_FORMAT = 1
_LIKE_PARAMETERS = ("/parts/optimizer/", "/parts/weights/", "/parts/average/", "/parts/reference/")
"""Tensors that have the shapes of parameters, and are sharded as they are."""


class BadState(Exception):
    """A state that cannot be read: what is wrong, in words."""


def save_state(folder: Path, tree: Any) -> None:
    """Writes state.json and state.safetensors into a folder, neither of them aside: see `dpo.durable`.

    All ranks call it, with trees of one structure; what they hold parts of goes to sharded/, see `dpo.sharded`.
    """
    tensors = _Tensors()
    skeleton = _encode(tree, "", tensors)
    if tensors.parts:
        save_parts(folder, tensors.parts)
    if not is_main():
        return
    save_file(tensors.held, folder / "state.safetensors")
    text = json.dumps({"format": _FORMAT, "state": skeleton})
    (folder / "state.json").write_text(text, encoding="utf-8")


def load_state(folder: Path, mesh: DeviceMesh | None = None) -> Any:
    """The tree of `save_state`, with its tensors on the CPU; given a mesh, those like parameters sharded over it.

    Raises:
        BadState: a file is missing, is not what it should be, or is of another format.
    """
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "state.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise BadState(f"expected state.json and state.safetensors, found: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise BadState(f"expected state.json of format {_FORMAT}, found {found!r}")
    try:
        tensors |= load_parts(folder, mesh)
        if mesh is not None:  # written by one process
            tensors = {k: spread_like(v, mesh) if k.startswith(_LIKE_PARAMETERS) else v for k, v in tensors.items()}
        return _decode(content["state"], tensors)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadState(f"expected a state whose parts are all there, found: {error!r}") from error


class _Tensors:
    """Tensors by name, contiguous on the CPU. Memory that two share is copied: safetensors refuses it."""

    def __init__(self) -> None:
        self.held: dict[str, Tensor] = {}
        self.parts: dict[str, DTensor] = {}
        self._memory: set[int] = set()

    def add(self, name: str, value: Tensor) -> None:
        if name in self.held or name in self.parts:
            raise TypeError(f"{name}: expected keys that differ as strings, found two that do not")
        if isinstance(value, DTensor):
            self.parts[name] = value.detach()  # pyright: ignore[reportArgumentType]
            return
        value = value.detach().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        self.held[name] = value.clone() if memory in self._memory else value
        self._memory.add(memory)


def _encode(value: Any, path: str, tensors: _Tensors) -> Any:
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, Tensor):
        tensors.add(path, value)
        return {"tensor": path}
    if isinstance(value, dict):
        return {"dict": [[key, _encode(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_encode(item, f"{path}/{k}", tensors) for k, item in enumerate(value)]}
    raise TypeError(f"{path}: expected a state of tensors, numbers and strings, found a {type(value).__name__}")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    if kind not in ("list", "tuple"):
        raise ValueError(f"unknown part {kind!r}")
    return items if kind == "list" else tuple(items)
