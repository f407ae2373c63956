"""`dpo plan`: how much memory a run takes on each rank, before it is started.

The model's own code is traced on fake tensors (`plan_trace`): what activations take is counted, not looked up, for any
architecture. Everything else follows from sizes.

Shapes: S tokens of a bin, N rows of the LM head, V vocabulary, H hidden, L blocks, R ranks.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from dpo_kernels.plans import choose_plan
from transformers import AutoConfig, LlamaConfig

from dpo.commands import PlanConfig
from dpo.console import console, table
from dpo.errors import UserError
from dpo.parallel import REPLICATED_SHARE, blocks_of
from dpo.plan_trace import count_saved, fake_model, quiet

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
_STATES = {"rmsprop": 1, "adamw": 2}


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one rank, by what they hold, at the moment of the step when they are most together."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    gathered: int
    """FSDP: embedding and LM head whole with their gradient, and the blocks at work."""
    copies: int
    """bf16 autocast: copies of the weights that it casts."""
    activations: int
    head: int
    """Of the LM head: hidden rows, kept logits, the tile at work, and the weight's gradient before it is added."""
    backward: int
    """Gradients of the activations of the block at work."""
    runtime: int
    """Python and its libraries (CPU only; on a GPU, CUDA's context of about 0.5 GiB comes on top)."""
    peak: int
    """The most at any moment: less than the sum of the above where these are not there together."""
    parallel: str
    """none, ddp or fsdp."""
    total_parameters: int


@dataclass(frozen=True)
class _Sizes:
    """What the model's configuration says, in numbers of parameters and in bytes for S tokens."""

    total: int
    root: int
    block: int
    matrices: int
    vocabulary: int
    hidden: int
    kept: int
    inputs: int
    block_kept: int
    outside: int
    widest: int
    copies: int
    block_copies: int


def plan_memory(config: PlanConfig) -> MemoryPlan:
    """Sizes a run. Raises UserError where the model's configuration cannot be read or traced."""
    sizes = _sizes(config)
    memory = config.memory_gib * 2**30
    how = "none"
    if config.ranks > 1:
        states = (2 + _STATES[config.optimizer]) * 4 * sizes.total
        how = config.parallel
        if how == "auto":
            how = "ddp" if states <= REPLICATED_SHARE * memory else "fsdp"
    shards = config.ranks if how == "fsdp" else 1
    compute = 2 if config.dtype == "bf16" else 4

    def share(values: int) -> int:
        return -(-values // shards)

    parameters = share(4 * sizes.total)
    reference = 0
    if config.reference == "online":
        narrow = sizes.matrices if config.dtype == "bf16" and how != "fsdp" else 0
        reference = share(4 * sizes.total - 2 * narrow)
    gathered = 0
    if how == "fsdp":
        # whole: the root and its gradient; the block at work and the next; a block's gradient, and widened for the sum
        gathered = 8 * sizes.root + (2 + 1) * compute * sizes.block + 4 * sizes.block
    copies, block_copies = (0, 0) if how == "fsdp" else (sizes.copies, sizes.block_copies)
    activations = sizes.kept + sizes.outside
    if config.gradient_checkpointing:
        activations = sizes.inputs + sizes.outside
    backward = 3 * sizes.widest + 8 * config.token_budget * sizes.hidden
    if config.gradient_checkpointing:
        backward += sizes.block_kept + block_copies
    head, head_gradient = _head(config, sizes)
    gradients, optimizer = share(4 * sizes.total), share(_STATES[config.optimizer] * 4 * sizes.total)
    runtime = _resident() if config.device == "cpu" else 0

    always = parameters + optimizer + reference + gathered + runtime
    before = gradients if config.bins > 1 else 0
    in_backward = 0 if config.gradient_checkpointing else copies
    moments = (
        before + activations + copies + head + head_gradient,
        before + activations + in_backward + head_gradient + backward,
        gradients + 4 * sizes.vocabulary * sizes.hidden,
    )
    return MemoryPlan(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        reference=reference,
        gathered=gathered,
        copies=copies,
        activations=activations,
        head=head + head_gradient,
        backward=backward,
        runtime=runtime,
        peak=always + max(moments),
        parallel=how,
        total_parameters=sizes.total,
    )


def _head(config: PlanConfig, sizes: _Sizes) -> tuple[int, int]:
    """Bytes of rows, kept tiles and the tile at work; and of the weight's gradient of one bin."""
    rows = max(1, round(config.token_budget * config.completion_share))
    compute = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    workspace = None if config.head_workspace_mb is None else config.head_workspace_mb << 20
    plan = choose_plan(
        rows,
        sizes.vocabulary,
        sizes.hidden,
        compute,
        True,
        workspace,
        weight_grad_dtype=torch.float32 if compute == torch.float32 else None,
        device=config.device,
    )
    # hidden rows, rounded for the products; and the gradients of both
    moved = rows * sizes.hidden * (8 + 2 * (compute.itemsize if compute != torch.float32 else 0))
    return moved + plan.workspace_bytes + plan.tile_bytes, 4 * sizes.vocabulary * sizes.hidden


def _sizes(config: PlanConfig) -> _Sizes:
    model_config = load_shape(config.model, trust_remote_code=config.trust_remote_code)
    text = model_config.get_text_config(decoder=True)
    autocast = torch.bfloat16 if config.dtype == "bf16" else None
    narrow = config.device == "cuda"
    try:
        with quiet():
            whole, _ = fake_model(model_config)
            traced, mode = fake_model(_with_blocks(model_config, min(_TRACED_BLOCKS, text.num_hidden_layers)))
            some, double = (count_saved(traced, mode, n, autocast, narrow) for n in (512, 1024))
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--model {config.model}: cannot be traced: {reason[:300]}") from error
    blocks = blocks_of(whole)
    in_blocks = [sum(p.numel() for p in block.parameters()) for block in blocks]
    total = sum(p.numel() for p in whole.parameters())
    scale = len(blocks) / len(some.blocks) * config.token_budget / 512
    per_block = [b - a for a, b in zip(some.blocks, double.blocks, strict=True)]
    fixed = [a - grown for a, grown in zip(some.blocks, per_block, strict=True)]
    return _Sizes(
        total=total,
        root=total - sum(in_blocks),
        block=max(in_blocks),
        matrices=sum(p.numel() for block in blocks for p in block.parameters() if p.dim() > 1),
        vocabulary=whole.get_output_embeddings().weight.shape[0],
        hidden=whole.get_output_embeddings().weight.shape[1],
        kept=round(sum(per_block) * scale),
        inputs=round(sum(some.inputs) * scale),
        block_kept=round(max(per_block) * config.token_budget / 512),
        outside=round((double.outside - some.outside) * config.token_budget / 512),
        widest=round(some.widest * config.token_budget / 512),
        copies=round(sum(fixed) * len(blocks) / len(some.blocks)),
        block_copies=max(fixed),
    )


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


def _resident() -> int:
    """What this process holds now: the interpreter and the libraries that training loads too."""
    import dpo.train  # noqa: F401  # the libraries of a run

    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 500 << 20
    import os

    return pages * os.sysconf("SC_PAGE_SIZE")


_ROWS = (
    ("parameters", "fp32"),
    ("gradients", "fp32"),
    ("optimizer", ""),
    ("reference", ""),
    ("gathered", "embedding and LM head whole, blocks at work"),
    ("copies", "bf16 copies of weights"),
    ("activations", "kept for the backward"),
    ("head", "LM head: rows, kept logits, its gradient"),
    ("backward", "gradients of activations, one block"),
    ("runtime", "Python and libraries"),
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
    rows.append(("peak", f"{result.peak / 2**30:.2f}", "the most at one moment"))
    table(
        f"{config.model}: {result.total_parameters / 1e9:.2f}B parameters, {config.dtype}, bins of "
        f"{config.token_budget} tokens, {where}",
        ("on each rank", "GiB", ""),
        rows,
    )
    fits = "fits" if result.peak <= config.memory_gib * 2**30 else "does not fit"
    console.print(f"{fits} into {config.memory_gib:g} GiB (--memory-gib)", markup=False)
    return result
