"""A vocabulary-sharded LM head: rank i of a process group holds rows [v_i, v_i+1) of the weight, in rank order.

Shapes: N rows, V vocabulary of this rank's shard. Shards may differ in size. Every rank passes the same rows and
targets and gets the same log-probs, bit for bit: shards' statistics are gathered and merged in rank order, in float64.
In the backward every rank has the whole gradient of its own shard; that of the rows is summed over ranks. Collectives
are the same for every plan, so ranks may choose different ones. Nothing here waits for the host.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from .common import check_index


def name_of(process_group: ProcessGroup | str | None) -> str:
    """The group's registered name, "" for none: what an operator's schema can carry."""
    if process_group is None or isinstance(process_group, str):
        return process_group or ""
    return process_group.group_name


def resolve(name: str) -> ProcessGroup:
    from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]

    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]


class Shard(NamedTuple):
    """Where this rank's rows lie in the whole vocabulary."""

    targets: Tensor
    """[N] in this shard's numbering; `ignore_index` where ignored, `elsewhere` where another shard's"""
    vocabulary: int | Tensor
    """of all shards together; on a GPU a tensor, which nobody waits for"""
    elsewhere: int | None
    """None: there is but one shard"""


def locate(targets: Tensor, vocabulary: int, ignore_index: int, group: str) -> Shard:
    """This rank's `Shard`, from one gather of the shards' sizes. ValueError (on CPU) for targets outside all shards."""
    if not group:
        return Shard(targets, vocabulary, None)
    found = resolve(group)
    size = torch.full((1,), vocabulary, dtype=torch.int64, device=targets.device)
    sizes = torch.stack(_gathered(size, found))
    total = sizes.sum()
    start = sizes[: found.rank()].sum()
    if targets.device.type == "cpu":
        check_index("targets", targets, int(total), allow=ignore_index)
    elsewhere = -1 if ignore_index != -1 else -2
    local = targets - start
    local = local.where((local >= 0) & (local < vocabulary), elsewhere).where(targets != ignore_index, ignore_index)
    return Shard(local, total, elsewhere)


def _gathered(part: Tensor, group: ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(part) for _ in range(group.size())]
    dist.all_gather(parts, part, group=group)
    return parts


class RowSums(NamedTuple):
    """Statistics of rows over one shard, [N] each: maximum m of the scores and sums relative to it (tiles.RowState)."""

    maximum: Tensor
    total: Tensor
    target: Tensor
    weighted: Tensor | None
    squares: Tensor | None
    plain: Tensor | None


def merge(local: RowSums, scale: float, group: str) -> tuple[RowSums, Tensor]:
    """The statistics over all shards, float64, and exp(scale * (shard's maximum - whole maximum)) [N].

    local: the target's score is -inf where it is another shard's. scale: what scores are multiplied by inside exp.
    """
    named = [(name, part.double()) for name, part in zip(local._fields, local, strict=True) if part is not None]
    gathered = _gathered(torch.stack([part for _, part in named]), resolve(group))
    parts = {name: torch.stack([shard[i] for shard in gathered]) for i, (name, _) in enumerate(named)}
    maximum = parts["maximum"].amax(0)
    drop = (parts["maximum"] - maximum) * scale
    rescale = drop.exp()
    merged = {"maximum": maximum, "total": (parts["total"] * rescale).sum(0), "target": parts["target"].amax(0)}
    if "weighted" in parts:
        moved = parts["weighted"] + torch.where(parts["total"] > 0, drop / scale * parts["total"], 0.0)
        merged["weighted"] = (moved * rescale).sum(0)
    if "squares" in parts:
        merged["squares"] = (parts["squares"] * rescale.square()).sum(0)
    if "plain" in parts:
        merged["plain"] = parts["plain"].sum(0)
    whole = RowSums(*(merged.get(name) for name in local._fields))  # pyright: ignore[reportArgumentType]
    return whole, rescale[resolve(group).rank()]


def sum_over_ranks(group: str, *parts: Tensor | None) -> None:
    """Adds up each part over the group, in place."""
    for part in parts:
        if part is not None and group:
            dist.all_reduce(part, group=resolve(group))
