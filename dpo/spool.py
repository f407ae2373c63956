"""Token groups in Arrow: in memory while they are few, else in a temporary file that is mapped into memory, so that big
data stays on disk."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable

MEMORY_BYTES = 256 * 2**20
"""Tables up to this size stay in memory."""


class Spool:
    """Collects rows of one schema, batch by batch, in a `with` block. The file, where there is one, lies in the folder
    for temporary files (TMPDIR) and goes with the last user of the dataset, or when the process that made it ends."""

    def __init__(self, schema: pa.Schema, memory_bytes: int | None = None):
        self._schema = schema
        self._memory_bytes = MEMORY_BYTES if memory_bytes is None else memory_bytes
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._folder: str | None = None
        self._removal: weakref.finalize | None = None
        self._writer: pa.RecordBatchStreamWriter | None = None

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._removal is not None:
            self._removal()  # nothing to do once `finish` has handed the file over

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        batch = pa.RecordBatch.from_pylist(list(rows), schema=self._schema)
        if not batch.num_rows:
            return
        if self._writer is not None:
            self._writer.write_batch(batch)
            return
        self._batches.append(batch)
        self._bytes += batch.nbytes
        if self._bytes > self._memory_bytes:
            self._to_disk()

    def _to_disk(self) -> None:
        self._folder = tempfile.mkdtemp(prefix="fused-dpo-")
        self._removal = weakref.finalize(self, _remove, self._folder, os.getpid())
        self._writer = pa.ipc.new_stream(str(Path(self._folder) / "groups.arrow"), self._schema)
        for batch in self._batches:
            self._writer.write_batch(batch)
        self._batches.clear()

    def finish(self) -> datasets.Dataset:
        """The rows as a dataset in Arrow format. The file lives as long as this very object."""
        if self._writer is None or self._folder is None:
            return datasets.Dataset(
                InMemoryTable(pa.Table.from_batches(self._batches, schema=self._schema))
            ).with_format("arrow")
        self._writer.close()
        dataset = datasets.Dataset.from_file(str(Path(self._folder) / "groups.arrow")).with_format("arrow")
        assert self._removal is not None
        self._removal.detach()
        weakref.finalize(dataset, _remove, self._folder, os.getpid())
        return dataset


def _remove(folder: str, owner: int) -> None:
    # A forked data worker that ends must not take the file away from the others.
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
