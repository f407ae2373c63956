"""Updates of parameters that ranks hold rows of, or of whole ones on one process."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from dpo.optim import OPTIMIZERS, apply_update, build_optimizer
from dpo.placement import WHOLE_ONLY
from dpo.precision import MasterWeights, RoundedWeights, Weights

SHAPES = (5, 7), (3,), (1, 4), (6, 2, 3)
ROUNDED = "rmsprop", "adamw"
UPDATED = tuple(name for name in OPTIMIZERS if name not in WHOLE_ONLY)


def _held(tensor: Tensor) -> Tensor:
    if not dist.is_initialized():
        return tensor
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)


def updated(name: str, kind: type[Weights], dtype: torch.dtype) -> list[Tensor]:
    """Weights after three updates, the second of which is skipped, whole."""
    draw = torch.Generator().manual_seed(0)
    params = [nn.Parameter(_held(torch.randn(shape, generator=draw).to(dtype))) for shape in SHAPES]
    weights = RoundedWeights(params, seed=3, chunk=20) if kind is RoundedWeights else kind(params)
    optimizer = build_optimizer(name, weights.targets, lr=1e-2)
    for loss in (1.0, torch.nan, 1.0):
        for p, shape in zip(params, SHAPES, strict=True):
            p.grad = _held(torch.randn(shape, generator=draw).to(dtype))
            if isinstance(weights, MasterWeights):
                weights._collect(p)
        apply_update(optimizer, torch.tensor(loss), 2.0, weights=weights)
    return [getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for p in params]


def results() -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """bf16 weights rounded at random, and float64 weights, after the updates of each optimizer."""
    rounded = {name: updated(name, RoundedWeights, torch.bfloat16) for name in ROUNDED}
    return rounded, {name: updated(name, Weights, torch.float64) for name in UPDATED}
