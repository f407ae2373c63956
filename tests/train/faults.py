"""A disk that dies, or fills up, at a chosen write: what a run leaves behind is then what a power cut would leave.

Every write, fsync, rename and delete below a folder is an event, numbered in order. At the chosen event the disk dies:
from then on nothing touches it any more, and of every file only what was flushed by fsync is there for sure (and half
of the rest).
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import transformers.modeling_utils

import dpo.statefile
import dpo.store


class Crash(BaseException):
    """The machine has lost power."""


class Disk:
    """Counts events under `root`; dies at event `at` (None: never), or is full from there on."""

    def __init__(self, root: Path, at: int | None = None, *, full: bool = False) -> None:
        self.root, self.at, self.full, self.dead = root, at, full, False
        self.events: list[str] = []
        self._synced = {path.stat().st_ino: path.stat().st_size for path in root.rglob("*") if path.is_file()}
        self._patches = pytest.MonkeyPatch()

    def __enter__(self) -> Disk:
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir"):
            self._patches.setattr(os, name, self._wrap(name, getattr(os, name)))
        self._patches.setattr(os, "fsync", self._fsync(os.fsync))
        opened = self._open(io.open)
        self._patches.setattr(builtins, "open", opened)
        self._patches.setattr(io, "open", opened)
        save = self._save(safetensors.torch.save_file)
        self._patches.setattr(dpo.statefile, "save_file", save)
        self._patches.setattr(dpo.store, "save_file", save)
        self._patches.setattr(transformers.modeling_utils, "safe_save_file", save)
        return self

    def __exit__(self, kind: type | None, *rest: object) -> bool:
        self._patches.undo()
        if self.dead and not self.full:
            for path in self.root.rglob("*"):
                if path.is_file():
                    size, sure = path.stat().st_size, self._synced.get(path.stat().st_ino, 0)
                    if size > sure:
                        os.truncate(path, sure + (size - sure) // 2)
        return kind is Crash

    def _event(self, kind: str, path: Path) -> None:
        if self.dead and not self.full:
            raise Crash
        if len(self.events) == self.at:
            self.dead = True
        self.events.append(f"{kind} {path.relative_to(self.root)}")
        if self.dead and self.full and kind in ("write", "save", "fsync", "mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def _path(self, path: Any, dir_fd: int | None = None) -> Path | None:
        """The absolute path if it is below the root."""
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        elif dir_fd is not None:
            path = Path(f"/proc/self/fd/{dir_fd}").readlink() / os.fsdecode(path)
        path = Path(os.path.abspath(os.fsdecode(path)))  # noqa: PTH100 (resolve would follow links)
        return path if path.is_relative_to(self.root) and path != self.root else None

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *args: Any, **options: Any) -> Any:
            where = self._path(path, options.get("dir_fd"))
            if where is not None:
                self._event(name, where)
                if self.dead and not self.full:
                    raise Crash
            return function(path, *args, **options)

        return wrapped

    def _fsync(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def fsync(handle: int) -> None:
            where = self._path(handle)
            if where is not None:
                self._event("fsync", where)
                if self.dead:
                    raise Crash
                status = os.fstat(handle)
                self._synced[status.st_ino] = status.st_size
            function(handle)

        return fsync

    def _open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            where = None if isinstance(file, int) else self._path(file)
            if where is None or not set(mode) & set("wax+"):
                return function(file, mode, *args, **options)
            if self.dead and not self.full:
                raise Crash
            if "w" in mode and where.exists():
                self._synced[where.stat().st_ino] = 0
            return _File(function(file, mode, *args, **options), self, where)

        return opened

    def _save(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def save(tensors: Any, path: Any, *args: Any, **options: Any) -> None:
            where = self._path(path)
            if where is not None:
                self._event("save", where)
            function(tensors, path, *args, **options)
            if self.dead and where is not None:
                raise Crash

        return save


class _File:
    def __init__(self, file: Any, disk: Disk, path: Path) -> None:
        self._file, self._disk, self._path = file, disk, path

    def write(self, data: Any) -> int:
        self._disk._event("write", self._path)
        if self._disk.dead and not self._disk.full:
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise Crash
        return self._file.write(data)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
