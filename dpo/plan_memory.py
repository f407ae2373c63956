"""`dpo plan`: how much memory a run takes on each rank, before it is started.

The model's own code is traced on fake tensors (`plan_trace`): what activations take is counted, not looked up, for any
architecture. Everything else follows from sizes.

Shapes: S tokens of a bin, N rows of the LM head, V vocabulary, H hidden, L blocks, R ranks.
"""

from __future__ import annotations

import copy
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from dpo_kernels.plans import choose_plan
from transformers import AutoConfig, LlamaConfig

from dpo.adapters import factors, head_parts
from dpo.commands import PlanConfig
from dpo.console import console, table
from dpo.errors import UserError
from dpo.inputs import AUTOCAST
from dpo.parallel import blocks_of, choose_for
from dpo.plan_trace import add_fake_adapter, count_saved, fake_model, quiet
from dpo.reference import linear_layers

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
}
"""Llamas of the usual sizes, which `--model` takes by these names."""

_TRACED_BLOCKS = 8
_STATES = {"rmsprop": 1, "adamw": 2, "adam": 2, "adagrad": 1, "sgd": 0}
"""Values an optimizer keeps of every parameter."""

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight in 4 bits: itself, its block's scale in 8 bits, and that one's own (QLoRA, Dettmers et al. 2023)."""

_ROUNDED_AT_ONCE = 1 << 26
"""Parameters that --bf16-update random holds in fp32 at a time."""

HEAP_GAPS = 0.5
"""What glibc 2.36's heap loses to fragmentation at the peak of steps on the CPU, of what tensors hold then: measured
0.5 to 0.6 in fp32. Tensors are aligned to 64 bytes: what alignment cuts off a freed block becomes a place for small
objects, and the next tensor of that size does not fit between them any more."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank, by what they hold, at the moment of the step when they are most together."""

    parameters: int
    """Weights as they are stored, those that do not train among them."""
    gradients: int
    optimizer: int
    """Its states."""
    masters: int
    """fp32 weights behind bf16 parameters, and the average of --ema."""
    reference: int
    gathered: int
    """FSDP: embedding and LM head whole with their gradient, and the blocks at work."""
    copies: int
    """bf16 or fp16 copies of the weights: autocast's, or those of weights in 4 bits."""
    activations: int
    head: int
    """Of the LM head: hidden rows, kept logits, the tile at work, and the weight's gradient before it is added."""
    backward: int
    """Gradients of the activations of the block at work."""
    live: int
    """The most that tensors hold at any moment: less than the sum of the above where these are not there together. What
    `torch.cuda.max_memory_allocated` counts."""
    runtime: int
    """Python and its libraries (CPU only; on a GPU, CUDA's context of about 0.5 GiB comes on top)."""
    gaps: int
    """CPU only: freed memory that glibc's heap keeps and cannot reuse, see `HEAP_GAPS`."""
    peak: int
    """Of the process: live, runtime and gaps."""
    parallel: str
    """none, ddp or fsdp."""
    total_parameters: int


@dataclass(frozen=True)
class _Sizes:
    """What the model's own code says, in numbers of parameters and in bytes for S tokens."""

    total: int
    trained: int
    stored: int
    """Bytes of all weights."""
    reference: int
    """Bytes of the weights of a second model, frozen."""
    root: int
    """Bytes of the weights outside the blocks."""
    block: int
    """Parameters of the largest block, and those of them that train."""
    block_trained: int
    largest: int
    """Parameters of the largest weight that trains."""
    head: tuple[int, int]
    """V, H."""
    head_dtype: torch.dtype
    head_trains: bool
    kept: int
    inputs: int
    block_kept: int
    outside: int
    widest: int
    copies: int
    block_copies: int
    how: str
    """none, ddp or fsdp."""


def plan_memory(config: PlanConfig) -> MemoryPlan:
    """Sizes a run. Raises UserError where the model's configuration cannot be read or traced."""
    sizes = _sizes(config)
    shards = config.ranks if sizes.how == "fsdp" else 1

    def share(values: int) -> int:
        return -(-values // shards)

    states = share(_STATES[config.optimizer] * 4 * sizes.trained)
    always = {
        "parameters": share(sizes.stored),
        "optimizer": states,
        "masters": share(_masters(config) * sizes.trained),
        "reference": share(sizes.reference) if config.reference == "online" else 0,
        "gathered": _gathered(config, sizes) if sizes.how == "fsdp" else 0,
    }
    gradients = share(4 * sizes.trained)
    copies, block_copies = (0, 0) if sizes.how == "fsdp" else (sizes.copies, sizes.block_copies)
    activations = sizes.outside + (sizes.inputs if config.gradient_checkpointing else sizes.kept)
    backward = 3 * sizes.widest + 8 * config.token_budget * sizes.head[1]
    if config.gradient_checkpointing:
        backward += sizes.block_kept + block_copies
    head, head_gradient = _head(config, sizes)
    # buckets of DDP are there from the start
    before = gradients if config.bins > 1 or sizes.how == "ddp" else 0
    in_backward = 0 if config.gradient_checkpointing else copies
    moments = (
        before + activations + copies + head + head_gradient,
        before + activations + in_backward + head_gradient + backward,
        gradients + (head_gradient if config.bins > 1 else 0),
        gradients + _update(config, sizes),
    )
    live = sum(always.values()) + max(moments)
    runtime = resident_runtime() if config.device == "cpu" else 0
    gaps = round(HEAP_GAPS * live) if config.device == "cpu" and platform.libc_ver()[0] == "glibc" else 0
    return MemoryPlan(
        **always,
        gradients=gradients,
        copies=copies,
        activations=activations,
        head=head + head_gradient,
        backward=backward,
        live=live,
        runtime=runtime,
        gaps=gaps,
        peak=live + runtime + gaps,
        parallel=sizes.how,
        total_parameters=sizes.total,
    )


def _compute(config: PlanConfig) -> torch.dtype:
    return AUTOCAST[config.dtype] or torch.float32


def _masters(config: PlanConfig) -> int:
    """Bytes for every parameter that trains."""
    master = config.param_dtype == "bf16" and config.lora_r is None and config.bf16_update != "random"
    return 4 * master + 4 * (config.ema is not None)


def _gathered(config: PlanConfig, sizes: _Sizes) -> int:
    """FSDP: the root and its gradient; the block at work and the next; a block's gradient, and widened for the sum."""
    compute = _compute(config).itemsize
    root = 2 * sizes.root if sizes.head_trains else sizes.root
    return root + 2 * compute * sizes.block + (compute + 4) * sizes.block_trained


def _update(config: PlanConfig, sizes: _Sizes) -> int:
    """What rounding at random takes beside the gradients: a part of the weights in fp32, and random numbers for one."""
    if config.bf16_update != "random":
        return 0
    return 4 * min(sizes.trained, _ROUNDED_AT_ONCE + sizes.largest) + 16 * sizes.largest


def _head(config: PlanConfig, sizes: _Sizes) -> tuple[int, int]:
    """Bytes of rows, kept tiles and the tile at work; and of the weight's gradient of one bin."""
    rows = max(1, round(config.token_budget * config.completion_share))
    vocabulary, hidden = sizes.head
    compute = AUTOCAST[config.dtype] or sizes.head_dtype
    reuse = sizes.head_trains and config.device == "cpu"
    plan = choose_plan(
        rows,
        vocabulary,
        hidden,
        compute,
        sizes.head_trains,
        None if config.head_workspace_mb is None else config.head_workspace_mb << 20,
        weight_grad_dtype=sizes.head_dtype if reuse else None,
        kept_dtype=torch.float32 if config.device == "cuda" else None,
        device=config.device,
    )
    # hidden rows, rounded for the products; and the gradients of both
    moved = rows * hidden * (8 + 2 * (compute.itemsize if compute != torch.float32 else 0))
    gradient = vocabulary * hidden * sizes.head_dtype.itemsize if sizes.head_trains else 0
    return moved + plan.workspace_bytes + plan.tile_bytes, gradient


def _sizes(config: PlanConfig) -> _Sizes:
    model_config = load_shape(config.model, trust_remote_code=config.trust_remote_code)
    text = model_config.get_text_config(decoder=True)
    autocast, narrow = AUTOCAST[config.dtype], config.device == "cuda"
    try:
        with quiet():
            whole, _ = _model(model_config, config)
            traced, mode = _model(_with_blocks(model_config, min(_TRACED_BLOCKS, text.num_hidden_layers)), config)
            some, double = (count_saved(traced, mode, n, autocast, narrow) for n in (512, 1024))
    except UserError:
        raise
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model {config.model}: cannot be traced: {reason[:300]}") from error
    blocks, how = blocks_of(whole), _parallel(whole, config)
    parameters = list(whole.parameters())
    linear = [layer.weight for layer in linear_layers(whole) if not layer.weight.requires_grad]
    in_blocks = [list(block.parameters()) for block in blocks]
    trained = [p.numel() for p in parameters if p.requires_grad]
    of_4_bits = sum(p.numel() for p in linear) if config.load_in_4bit else 0
    stored = sum(p.nbytes for p in parameters)
    if of_4_bits:
        stored += round(NF4_BYTES * of_4_bits) - sum(p.nbytes for p in linear)
    scale = len(blocks) / len(some.blocks) * config.token_budget / 512
    per_block = [b - a for a, b in zip(some.blocks, double.blocks, strict=True)]
    fixed = [a - grown for a, grown in zip(some.blocks, per_block, strict=True)]
    # weights in 4 bits are widened one at a time
    widened = max((2 * p.numel() for p in linear), default=0) if of_4_bits else 0
    head = whole.get_output_embeddings()
    weight = head_parts(head).weight
    return _Sizes(
        total=sum(p.numel() for p in parameters),
        trained=sum(trained),
        stored=stored,
        reference=_reference_bytes(whole, config, how),
        root=stored - sum(p.nbytes for block in in_blocks for p in block),
        block=max(sum(p.numel() for p in block) for block in in_blocks),
        block_trained=max(sum(p.numel() for p in block if p.requires_grad) for block in in_blocks),
        largest=max(trained),
        head=(weight.shape[0], weight.shape[1]),
        head_dtype=weight.dtype,
        head_trains=weight.requires_grad,
        kept=round(sum(per_block) * scale),
        inputs=round(sum(some.inputs) * scale),
        block_kept=round(max(per_block) * config.token_budget / 512),
        outside=round((double.outside - some.outside) * config.token_budget / 512),
        widest=round(some.widest * config.token_budget / 512),
        copies=round(sum(fixed) * len(blocks) / len(some.blocks)) + widened,
        block_copies=max(fixed) + widened,
        how=how,
    )


def _model(model_config: Any, config: PlanConfig) -> tuple[Any, Any]:
    """A fake model with weights stored as in the run, and its adapter."""
    model, mode = fake_model(model_config, torch.bfloat16 if config.param_dtype == "bf16" else torch.float32)
    if config.lora_r is not None:
        add_fake_adapter(model, mode, config)
    return model, mode


def _parallel(model: Any, config: PlanConfig) -> str:
    """How the ranks share the model, as `dpo.placement` has it."""
    if config.ranks == 1:
        return "none"
    if config.parallel != "auto":
        return config.parallel
    sharded = config.param_dtype == "bf16" and config.lora_r is None
    return "fsdp" if sharded else choose_for(model, config.memory_gib * 2**30)


def _reference_bytes(model: Any, config: PlanConfig, how: str) -> int:
    """Of a second model's weights, frozen, without the policy's adapter."""
    adapters = {id(p) for module in factors(model) for p in module.parameters()}
    linear = {id(layer.weight) for layer in linear_layers(model)}
    plain = 2 if config.param_dtype == "bf16" else 4
    narrow = AUTOCAST[config.dtype] is not None and how != "fsdp"
    each = {True: NF4_BYTES if config.load_in_4bit else 2 if narrow else plain, False: plain}
    return round(sum(p.numel() * each[id(p) in linear] for p in model.parameters() if id(p) not in adapters))


def load_shape(model: str, *, trust_remote_code: bool = False) -> Any:
    """The configuration of `--model`: one of `SHAPES`, a config.json, a folder, or a model id."""
    if model in SHAPES:
        return LlamaConfig(**SHAPES[model])
    path = Path(model)
    source = str(path.parent) if path.is_file() and path.name == "config.json" else model
    if path.is_absolute() and not path.exists():
        raise UserError(f"--model {model}: expected a model id, a folder or a config.json, found nothing there")
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model {model}: no configuration: {reason[:300]}") from error


def _with_blocks(config: Any, count: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config(decoder=True)
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = list(text.layer_types)[:count]
    return config


@cache
def resident_runtime() -> int:
    """Bytes that the interpreter and the libraries of a run hold, in a process of their own."""
    code = "import dpo.train; from dpo.resident import peak_bytes; print(peak_bytes())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(found.stdout) if found.returncode == 0 else 500 << 20


_ROWS = (
    ("parameters", ""),
    ("gradients", "fp32"),
    ("optimizer", ""),
    ("masters", "fp32 weights behind bf16, average of --ema"),
    ("reference", ""),
    ("gathered", "embedding and LM head whole, blocks at work"),
    ("copies", "of weights, in the arithmetic's precision"),
    ("activations", "kept for the backward"),
    ("head", "LM head: rows, kept logits, its gradient"),
    ("backward", "gradients of activations, one block"),
    ("live", "the most that tensors hold at one moment"),
    ("runtime", "Python and libraries"),
    ("gaps", "freed, but lost between blocks of the heap"),
)


def plan(config: PlanConfig) -> MemoryPlan:
    """Prints the sizes of a run as a table, or as JSON."""
    result = plan_memory(config)
    if config.json:
        console.print_json(json.dumps({"settings": asdict(config), "bytes": asdict(result)}))
        return result
    where = f"{config.ranks} ranks, {result.parallel}" if config.ranks > 1 else "one process"
    rows = [
        (name, f"{getattr(result, name) / 2**30:.2f}", note if name != "optimizer" else config.optimizer)
        for name, note in _ROWS
        if getattr(result, name)
    ]
    rows.append(("peak", f"{result.peak / 2**30:.2f}", "of the process" if result.runtime else ""))
    table(
        f"{config.model}: {result.total_parameters / 1e9:.2f}B parameters, {config.dtype}, bins of "
        f"{config.token_budget} tokens, {where}",
        ("on each rank", "GiB", ""),
        rows,
    )
    fits = "fits" if result.peak <= config.memory_gib * 2**30 else "does not fit"
    console.print(f"{fits} into {config.memory_gib:g} GiB (--memory-gib)", markup=False)
    return result
