"""What a forward pass keeps for its backward, counted without memory: the model's own code runs on fake tensors.

Shapes: S packed tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AutoModelForCausalLM

from dpo.adapters import add_adapter, factors, lora_config
from dpo.commands import PlanConfig
from dpo.inputs import AUTOCAST
from dpo.parallel import blocks_of
from dpo.reference import linear_layers

_ATTENTION = "dpo_plan"


@dataclass
class Saved:
    """Bytes that are kept between forward and backward for S tokens: in each block, what enters it, and outside."""

    blocks: list[int] = field(default_factory=list)
    inputs: list[int] = field(default_factory=list)
    outside: int = 0
    widest: int = 0
    """The largest single tensor of a block."""


def fake_model(config: Any, dtype: torch.dtype = torch.float32) -> tuple[Any, FakeTensorMode]:
    """The model of a configuration, with weights that take no memory."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=_ATTENTION)
        model.tie_weights()
    model.config.use_cache = False
    return model, mode


def add_fake_adapter(model: Any, mode: FakeTensorMode, config: PlanConfig) -> None:
    """Puts a LoRA adapter on a fake model, and stores what it freezes as `dpo.reference.store_frozen` does."""
    assert config.lora_r is not None
    settings = lora_config(config.lora_r, targets=config.lora_targets)
    add_adapter(model, settings, config.model, "--lora-targets", on_meta=True)
    autocast = AUTOCAST[config.dtype]
    frozen = [] if autocast is None else [m for m in linear_layers(model) if not m.weight.requires_grad]
    for module, dtype in [(m, None) for m in factors(model)] + [(m, autocast) for m in frozen]:
        for name, p in module.named_parameters(recurse=False):
            with mode:  # Module.to would swap tensors, which fake ones refuse
                fake = torch.empty(p.shape, dtype=dtype or p.dtype)
            module.register_parameter(name, nn.Parameter(fake, requires_grad=p.requires_grad))


def count_saved(model: Any, mode: FakeTensorMode, tokens: int, autocast: torch.dtype | None, narrow: bool) -> Saved:
    """Runs the trunk on `tokens` tokens and counts what autograd keeps.

    Args:
        autocast: bf16 or None.
        narrow: whether attention keeps its inputs in autocast's dtype (CUDA) or in fp32 (CPU).
    """
    saved, seen = Saved(), {p.untyped_storage()._cdata for p in model.parameters()}
    current: list[int] = []
    hooks: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        current.append(len(saved.blocks))
        saved.blocks.append(0)
        first = args[0] if args else kwargs["hidden_states"]
        saved.inputs.append(first.nbytes)

    def leave(*_: Any) -> None:
        current.pop()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            kept.append(tensor)  # or its storage is freed, and another takes its number
            if current:
                saved.blocks[current[-1]] += storage.nbytes()
                if tokens in tensor.shape:  # and not a weight's copy
                    saved.widest = max(saved.widest, storage.nbytes())
            else:
                saved.outside += storage.nbytes()
        return tensor

    kept: list[Tensor] = []
    for block in blocks_of(model):
        hooks.append(block.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(block.register_forward_hook(leave))
    _KEPT_DTYPE.append(autocast if narrow else None)
    model.train()
    try:
        with (
            mode,
            torch.autocast("cpu", dtype=autocast, enabled=autocast is not None),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            positions = torch.arange(tokens).unsqueeze(0)
            model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False)
    finally:
        _KEPT_DTYPE.pop()
        for hook in hooks:
            hook.remove()
    return saved


_KEPT_DTYPE: list[torch.dtype | None] = []


class _Attention(torch.autograd.Function):
    """Keeps what the fused attention kernels keep: queries, keys, values, output, and a log-sum-exp a row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:3], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise AssertionError("only what is kept is counted")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, **_: Any
) -> tuple[Tensor, None]:
    narrow = _KEPT_DTYPE[-1] if _KEPT_DTYPE else None
    wide = narrow or torch.promote_types(torch.promote_types(query.dtype, value.dtype), torch.float32)
    out = _Attention.apply(query.to(wide), key.to(wide), value.to(wide))
    assert isinstance(out, Tensor)
    return out.to(value.dtype), None


AttentionInterface.register(_ATTENTION, _attention)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Transformers from warning about weights that nobody will use."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks by a name that Transformers has changed
            yield
    finally:
        logging.set_verbosity(before)
