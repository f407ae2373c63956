"""The reference's log-probs on disk, per token in fp32: computed once for any number of runs, packings and machines.

    ROOT/digests.json                               digests of model files, so that they are not read again
    ROOT/<digest of the reference>/reference.json   what the digest is of, for people
    ROOT/<digest of the reference>/*.safetensors    units: keys [C, 16], lengths [C], logps [N]; named by their content

A completion's key is a digest of the token ids of its prompt and its own. Units are written whole or not at all, never
changed, and checked against their names when they are opened: a store can be killed, copied and shared at any moment.

C completions, N tokens of a unit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpo.console import notice
from dpo.distributed import gathered
from dpo.durable import WRITE_ERRORS, write_file, write_text
from dpo.errors import UserError
from dpo.fingerprint import digest_of
from dpo.packing import Group

UNIT_TOKENS = 1 << 16
"""A unit is written once it holds this many log-probs: so much is computed again after a kill, at most."""
_KEY_BYTES = 16


def default_root() -> Path:
    """Where stores are without --reference-cache: under $FUSED_DPO_CACHE, or else the user's cache folder."""
    held = os.environ.get("FUSED_DPO_CACHE")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return (Path(held) if held else caches / "fused-dpo") / "references"


def token_keys(group: Group) -> list[bytes]:
    """The key of each completion of a group: a digest of the token ids of the prompt and of the completion."""
    prompt = np.asarray(group.prompt, dtype="<i8")
    base = hashlib.blake2b(np.asarray([len(prompt)], dtype="<i8").tobytes() + prompt.tobytes(), digest_size=_KEY_BYTES)
    keys = []
    for completion in group.completions:
        digest = base.copy()
        digest.update(np.asarray(completion, dtype="<i8").tobytes())
        keys.append(digest.digest())
    return keys


class ReferenceStore:
    """Log-probs by key, of one reference. What is put is readable at once, and on disk with the unit it belongs to."""

    def __init__(self, root: Path, identity: Mapping[str, Any]) -> None:
        """Opens the store of a reference, or makes it.

        Args:
            identity: everything that its log-probs depend on; another identity is another store.
        Raises:
            UserError: the folder cannot be made or read.
        """
        self.folder = root / digest_of(identity)
        self._units: list[Tensor] = []
        self._places: dict[bytes, tuple[int, int, int]] = {}
        self._pending: dict[bytes, Tensor] = {}
        self._pending_tokens = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / "reference.json").exists():
                write_text(self.folder / "reference.json", json.dumps(identity, indent=2) + "\n")
            paths = sorted(self.folder.glob("*.safetensors"))
            paths = [path for path in paths if not path.name.startswith(".")]
        except OSError as error:
            raise self._cannot("be used", error) from error
        self._seen: set[Path] = set()
        self._written: list[Path] = []
        self._attach_all(paths)

    def _attach_all(self, paths: Sequence[Path]) -> None:
        paths = [path for path in paths if path not in self._seen]
        self._seen.update(paths)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for path, unit in zip(paths, pool.map(_read_unit, paths), strict=True):
                if unit is None:
                    notice(f"{path}: not a whole unit of log-probs, its content is computed again")
                else:
                    self._attach(*unit)

    def exchange(self) -> None:
        """Takes over the units that other ranks have written, once all have.

        Raises:
            UserError: the folder is not one that all ranks see.
        """
        written = {name for names in gathered([path.name for path in self._written]) for name in names}
        missing = [name for name in sorted(written) if not (self.folder / name).exists()]
        if missing:
            raise UserError(
                f"--reference-cache {self.folder}: expected a folder that all ranks share, found no {missing[0]}, "
                "which another rank wrote"
            )
        self._attach_all([self.folder / name for name in sorted(written)])

    def _cannot(self, what: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split())
        return UserError(f"--reference-cache {self.folder}: cannot {what}: {reason}; what is there already is whole")

    def __len__(self) -> int:
        return len(self._places) + len(self._pending)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places or key in self._pending

    def __getitem__(self, key: bytes) -> Tensor:
        """Log-probs of a completion's tokens, fp32 on the CPU."""
        if key in self._pending:
            return self._pending[key]
        unit, start, stop = self._places[key]
        return self._units[unit][start:stop]

    def put(self, key: bytes, logps: Tensor) -> None:
        """Adds a completion's log-probs; the first that were put for a key stay."""
        if key not in self:
            self._pending[key] = logps.float()
            self._pending_tokens += len(logps)

    def commit(self) -> None:
        """Writes a unit if enough was put for one. Call it where a group of completions is complete."""
        if self._pending_tokens >= UNIT_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Writes what was put and is not on disk yet.

        Raises:
            UserError: the disk is full or read-only; everything written before is whole.
        """
        if not self._pending:
            return
        keys = torch.frombuffer(bytearray(b"".join(self._pending)), dtype=torch.uint8).view(-1, _KEY_BYTES)
        lengths = torch.tensor([len(logps) for logps in self._pending.values()])
        tensors = {"keys": keys, "lengths": lengths, "logps": torch.cat(list(self._pending.values()))}
        path = self.folder / f"{_content_digest(tensors)}.safetensors"
        try:
            write_file(path, lambda aside: save_file(tensors, aside))
            on_disk = load_file(path)  # mapped: memory holds what is looked at
        except WRITE_ERRORS as error:
            raise self._cannot("be written", error) from error
        self._pending, self._pending_tokens = {}, 0
        self._seen.add(path)
        self._written.append(path)
        self._attach(list(_split_keys(keys)), on_disk["lengths"], on_disk["logps"])

    def _attach(self, keys: Sequence[bytes], lengths: Tensor, logps: Tensor) -> None:
        ends = lengths.cumsum(0).tolist()
        for key, start, stop in zip(keys, [0, *ends[:-1]], ends, strict=True):
            self._places.setdefault(key, (len(self._units), start, stop))
        self._units.append(logps)


def _split_keys(keys: Tensor) -> list[bytes]:
    held = keys.contiguous().numpy().tobytes()
    return [held[i : i + _KEY_BYTES] for i in range(0, len(held), _KEY_BYTES)]


def _content_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=_KEY_BYTES)
    for name in ("keys", "lengths", "logps"):
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_unit(path: Path) -> tuple[list[bytes], Tensor, Tensor] | None:
    """Keys, lengths and log-probs of a unit; None unless its content is what its name says."""
    try:
        tensors = load_file(path)
        if _content_digest(tensors) != path.stem:
            return None
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        return None
    keys, lengths, logps = tensors["keys"], tensors["lengths"], tensors["logps"]
    kinds = (keys.dtype, lengths.dtype, logps.dtype) == (torch.uint8, torch.int64, torch.float32)
    if not kinds or keys.shape != (len(lengths), _KEY_BYTES) or logps.shape != (int(lengths.sum()),):
        return None
    return (_split_keys(keys), lengths, logps) if bool((lengths > 0).all()) else None
