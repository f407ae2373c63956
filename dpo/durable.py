"""Writes that survive a crash at any moment: aside, flushed to the disk, then renamed into place.

A file or folder under its final name is whole; what a crash leaves half written has a name that begins with `.writing-`
or `.deleting-`, and `sweep` removes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_WRITING, _DELETING = ".writing-", ".deleting-"

WRITE_ERRORS = (OSError, SafetensorError)
"""What a full or read-only disk raises: safetensors wraps the error of the system in one of its own."""


def write_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Makes or replaces a file: `fill` writes it under the name it is given, in the same folder.

    Processes that write the same name at once do not meet: each writes aside under a name of its own.
    """
    aside = path.with_name(f"{_WRITING}{os.getpid()}-{path.name}")
    try:
        fill(aside)
        sync(aside)
        aside.replace(path)
    except Exception:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Makes or replaces a text file."""
    write_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place at `path` when the block ends; a folder that was there goes then."""
    aside = path.with_name(_WRITING + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for folder, _, files in os.walk(aside):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        if path.is_dir():
            _doom(path)
        aside.rename(path)
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk is full of it
        raise
    sync(path.parent)
    shutil.rmtree(path.with_name(_DELETING + path.name), ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Deletes a folder; a crash meanwhile leaves nothing that looks like it."""
    shutil.rmtree(_doom(path), ignore_errors=True)


def _doom(path: Path) -> Path:
    doomed = path.with_name(_DELETING + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    return doomed


def sweep(folder: Path) -> None:
    """Removes what a crash left half written or half deleted in a folder that no other process writes to."""
    for path in folder.glob(".*"):
        if path.name.startswith((_WRITING, _DELETING)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
