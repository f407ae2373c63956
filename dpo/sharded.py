"""Tensors that ranks hold parts of, in files: `torch.distributed.checkpoint` (DCP) over safetensors, without pickle.

What was written on some number of ranks loads on any other, one process included.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor import empty as empty_parts

from dpo.adapters import adapter_of
from dpo.parallel import is_sharded

FOLDER = "sharded"
"""Of a checkpoint: a safetensors file a rank, with the place of each part in its header."""


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("torch.distributed.checkpoint")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def save_parts(folder: Path, tensors: Mapping[str, DTensor]) -> None:
    """Writes each rank's parts to `folder`/sharded; all ranks call it with the same names."""
    with _quiet():
        writer = HuggingFaceStorageWriter(str(folder / FOLDER), save_distributed=True)
        save(dict(tensors), storage_writer=writer)


def load_parts(folder: Path, mesh: DeviceMesh | None) -> dict[str, Tensor]:
    """All tensors of `folder`/sharded by name: whole on the CPU, or, given a mesh, this rank's share of each row-wise.

    Raises:
        ValueError: files are missing or damaged.
    """
    source = folder / FOLDER
    if not source.is_dir():
        return {}
    try:
        with _quiet():
            reader = HuggingFaceStorageReader(str(source))
            held: dict[str, Tensor] = {}
            for name, kind in reader.read_metadata().state_dict_metadata.items():
                held[name] = _empty(kind.size, kind.properties.dtype, mesh)  # pyright: ignore[reportAttributeAccessIssue]
            load(held, storage_reader=HuggingFaceStorageReader(str(source)), no_dist=mesh is None)
    except (OSError, SafetensorError, RuntimeError, AssertionError, KeyError, CheckpointException) as error:
        raise ValueError(
            f"expected the parts of tensors in {FOLDER}/, found: {' '.join(str(error).split())}"
        ) from error
    return held


def _empty(size: torch.Size, dtype: torch.dtype, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return torch.empty(size, dtype=dtype)
    return empty_parts(size, dtype=dtype, device_mesh=mesh, placements=[Shard(0)])


def spread_like(values: Mapping[str, Tensor] | Tensor, mesh: DeviceMesh) -> Any:
    """Whole tensors as this rank's rows of them."""
    if isinstance(values, Tensor):
        if isinstance(values, DTensor) or values.dim() == 0:
            return values
        return distribute_tensor(values.to(mesh.device_type), mesh, [Shard(0)], src_data_rank=None)
    return {name: spread_like(value, mesh) for name, value in values.items()}


def mesh_of(model: Any) -> DeviceMesh | None:
    """The mesh over which a model is sharded."""
    if not is_sharded(model):
        return None
    parts = (p for p in model.parameters() if isinstance(p, DTensor))
    return next(parts).device_mesh


def whole_weights(model: Any) -> dict[str, Tensor]:
    """The whole state dict of a sharded model on the CPU, on rank 0 (nothing on the others): of one with an adapter,
    what trains. All ranks call it."""
    only = adapter_of(model) is not None
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=only)
    whole = get_model_state_dict(model, options=options)
    return {name: value for name, value in whole.items() if isinstance(value, Tensor)}


def part_weights(model: Any) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, each once; of a sharded model this rank's parts."""
    buffers = {name: value for name, value in model.state_dict().items() if not isinstance(value, DTensor)}
    params = {name: p.detach() for name, p in model.named_parameters()}
    tied = {name for name, p in model.named_parameters(remove_duplicate=False)} - params.keys()
    return params | {name: value for name, value in buffers.items() if name not in params and name not in tied}


@torch.no_grad()
def take_weights(model: Any, weights: Mapping[str, Tensor], *, only: Collection[str] | None = None) -> None:
    """Copies weights by name into a model, sharded or not: all, or `only` some. ValueError where names differ."""
    own = {name: value for name, value in part_weights(model).items() if only is None or name in only}
    if own.keys() != weights.keys():
        differ = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"expected the weights of {type(model).__name__}, found other names, such as {differ[0]}")
    for name, target in own.items():
        value = weights[name]
        if isinstance(target, DTensor):
            value = spread_like(value, target.device_mesh)
        target.copy_(value)
