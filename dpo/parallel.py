"""A model on several ranks: sharded block by block (FSDP2), or whole on each (DDP).

Either way gradients are summed, never averaged: a step's loss is normalised over all ranks before any forward.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from dpo.errors import UserError

T = TypeVar("T")
How = Literal["fsdp", "ddp"]

_KEY = "_dpo_parallel"
REPLICATED_SHARE = 0.3
"""Replicas where the state of training takes at most this share of a rank's memory."""


def inside(model: Any, function: Callable[[], T]) -> T:
    """Runs a forward of `model` that reaches for its parts (trunk, LM head): their weights are whole inside.

    All ranks call it together. A model that no rank shares simply runs.
    """
    held = vars(model).get(_KEY)
    return function() if held is None else held.run(function)


def last_of_step(model: Any, last: bool) -> None:
    """Says whether the coming backward is the step's last: what is reduced, or given back, once a step waits for it."""
    held = vars(model).get(_KEY)
    if held is not None:
        held.last_of_step(last)


@contextmanager
def gathered_once(model: Any) -> Iterator[None]:
    """Embedding and LM head stay whole from one forward to the next inside the block.

    Outside, what a forward without gradient gathered is given back after it: `model.parameters()` are then always the
    rank's own parts.
    """
    held = vars(model).get(_KEY)
    if held is None:
        yield
    else:
        with held.gathered_once():
            yield


def is_sharded(model: Any) -> bool:
    """Whether the ranks hold parts of the model's weights."""
    return isinstance(model, FSDPModule)


class _Sharded:
    def __init__(self, model: Any, device: torch.device, compute: torch.dtype | None) -> None:
        self.model = model
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        # inputs stay as they are: autocast decides what each product rounds, as it does on one process
        low = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32 if compute else None, cast_forward_inputs=False
        )
        for block in blocks_of(model):
            fully_shard(block, mesh=mesh, mp_policy=low)
        # the root holds embedding, final norm and LM head, in the parameters' own dtype; see `last_of_step`
        whole = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(model, mesh=mesh, mp_policy=whole, reshard_after_forward=False)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                module.set_reduce_scatter_unused_params(True)  # experts that no token of a rank reached
        vars(model)["_dpo_run"] = lambda function: function()
        register_fsdp_forward_method(model, "_dpo_run")

        self._keep = False

    def run(self, function: Callable[[], T]) -> T:
        result = self.model._dpo_run(function)
        if not (self._keep or torch.is_grad_enabled()):
            self.model.reshard()
        return result

    @contextmanager
    def gathered_once(self) -> Iterator[None]:
        self._keep = True
        try:
            yield
        finally:
            self._keep = False
            self.model.reshard()

    def last_of_step(self, last: bool) -> None:
        # embedding and LM head are gathered, and their gradients reduced, once a step; blocks at every bin, for memory
        self.model.set_requires_gradient_sync(last, recurse=False)
        self.model.set_reshard_after_backward(last, recurse=False)


class _Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class _Replicated:
    def __init__(self, model: Any, device: torch.device, probe: Callable[[], Tensor] | None) -> None:
        model.to(device)
        unused = probe is not None and _leaves_unused(model, probe)
        with warnings.catch_warnings():  # newer releases of torch rename the first option
            warnings.simplefilter("ignore", FutureWarning)
            self.ddp = DistributedDataParallel(
                _Whole(model), broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=unused
            )
        self.ddp.register_comm_hook(None, _sum_of)

    def run(self, function: Callable[[], T]) -> T:
        return self.ddp(function)

    def gathered_once(self) -> AbstractContextManager[None]:
        return nullcontext()

    def last_of_step(self, last: bool) -> None:
        self.ddp.require_backward_grad_sync = last


def _leaves_unused(model: nn.Module, probe: Callable[[], Tensor]) -> bool:
    probe().backward()
    unused = any(p.grad is None for p in model.parameters() if p.requires_grad)
    model.zero_grad(set_to_none=True)
    return unused


def _sum_of(state, bucket):  # unannotated: DDP compares annotations with types, and ours are strings
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])


def blocks_of(model: Any) -> list[nn.Module]:
    """The decoder's blocks: the units that are gathered, computed and given back one after another."""
    decoder = model.get_decoder()
    lists = [child for child in decoder.modules() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise UserError(
            f"--parallel fsdp: expected a decoder with a list of blocks, found none in {type(model).__name__}"
        )
    return list(max(lists, key=len))


def choose(wanted: Literal["auto", "fsdp", "ddp"], model: nn.Module, device: torch.device) -> How:
    """Replicas where parameters, gradients and two optimizer states take little of a rank's memory."""
    if wanted != "auto":
        return wanted
    return choose_for(model, memory_of_a_rank(device))


def choose_for(model: nn.Module, memory: float) -> How:
    """`auto` for ranks of `memory` bytes each."""
    state = sum(4 * p.numel() * p.element_size() if p.requires_grad else p.nbytes for p in model.parameters())
    return "ddp" if state <= REPLICATED_SHARE * memory else "fsdp"


def memory_of_a_rank(device: torch.device) -> int:
    """Bytes that one rank may use: its GPU's, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // local


def spread(
    model: Any,
    how: How,
    device: torch.device,
    *,
    compute: torch.dtype | None = None,
    probe: Callable[[], Tensor] | None = None,
) -> None:
    """Spreads a model over the ranks; without torchrun it is moved to the device.

    Args:
        compute: the dtype in which FSDP gathers blocks (autocast's), or None for the parameters' own.
        probe: a small forward to a scalar: shows whether there are parameters that DDP must not wait for.
    """
    if not dist.is_initialized():
        model.to(device)
    elif how == "fsdp":
        vars(model)[_KEY] = _Sharded(model, device, compute)
    elif any(p.requires_grad for p in model.parameters()):
        vars(model)[_KEY] = _Replicated(model, device, probe)
    else:
        model.to(device)
