"""Digests of models on disk: equal only where weights, configuration and adapter are equal byte by byte."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from dpo.durable import WRITE_ERRORS, write_text
from dpo.errors import UserError

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".py"}
_SETTINGS = {"config.json", "adapter_config.json"}
_SETTLED_SECONDS = 2.0
"""A file younger than this may change again without a new time stamp: its digest is not remembered."""


class FileDigests:
    """Digests of files, remembered by path, size, inode and times of change: 140 GB are not read at every start."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory, self._changed = memory, False
        self._held: dict[str, list[Any]] = {}
        if memory is not None:
            with suppress(OSError, ValueError):
                held = json.loads(memory.read_text(encoding="utf-8"))
                self._held = held if isinstance(held, dict) else {}

    def of(self, files: Iterable[Path]) -> dict[str, str]:
        """Digest of each file by its name, read at the same time where they are many."""
        files = sorted(files)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            digests = list(pool.map(self._digest, files))
        if self._changed and self._memory is not None:
            self._changed = False
            with suppress(*WRITE_ERRORS):  # it only saves time
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                write_text(self._memory, json.dumps(self._held))
        return {path.name: digest for path, digest in zip(files, digests, strict=True)}

    def _digest(self, path: Path) -> str:
        real = path.resolve()
        before = _stamp(real)
        held = self._held.get(str(real))
        if isinstance(held, list) and held[:-1] == before:
            return str(held[-1])
        with real.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
        settled = time.time() - max(before[1:3]) / 1e9 > _SETTLED_SECONDS
        if settled and _stamp(real) == before:
            self._held[str(real)] = [*before, digest]
            self._changed = True
        return digest


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def model_digest(path: str, digests: FileDigests, *, flag: str = "--model", with_base: bool = True) -> str:
    """Digest of a model's files: weights, configuration (rotary scaling, windows, caps, quantisation), code, adapter.

    path: a folder, a `.gguf` file, or a model id whose files are in the local cache. An adapter brings its base model
    in, unless told otherwise. Raises UserError when there is nothing to read, or not all of it.
    """
    local = Path(path)
    try:
        if local.is_file():
            return digest_of(sorted(digests.of([local]).values()))
        folder = local if local.is_dir() else _cached_folder(path)
        files = [file for file in folder.iterdir() if file.suffix in _WEIGHTS or file.name in _SETTINGS]
        _check_complete(folder, {file.name for file in files})
        parts: dict[str, Any] = {"files": digests.of(file for file in files if file.is_file())}
        adapter = folder / "adapter_config.json"
        base = json.loads(adapter.read_text()).get("base_model_name_or_path") if adapter.exists() else None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{flag} {path}: expected the files of a model, found: {reason}") from error
    if base and with_base and Path(str(base)).resolve() != folder.resolve():
        parts["base"] = model_digest(str(base), digests, flag=flag)
    return digest_of(parts)


def _check_complete(folder: Path, names: set[str]) -> None:
    if not any(Path(name).suffix in _WEIGHTS - {".py"} for name in names):
        raise FileNotFoundError("no weights")
    for index in folder.glob("*.index.json"):
        missing = set(json.loads(index.read_text())["weight_map"].values()) - names
        if missing:
            raise FileNotFoundError(f"{index.name} without {min(missing)}")


def _cached_folder(name: str) -> Path:
    for file in ("config.json", "adapter_config.json"):
        found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        if found is not None:
            return Path(found).parent
    raise FileNotFoundError("no files of it in the local cache")


def digest_of(value: Any) -> str:
    """Digest of nested dicts, lists, strings and numbers."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
