"""`dpo merge`: a LoRA adapter and its base model become one checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from dpo.adapters import base_of, is_adapter, load_adapter, merge
from dpo.checkpoint import save_model
from dpo.commands import MergeConfig
from dpo.console import say
from dpo.errors import UserError
from dpo.load import checkpoint_dtype, load_model, load_tokenizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def merge_adapter(config: MergeConfig) -> Path:
    """Writes the merged model and its tokenizer to --output.

    Returns:
        the folder.
    Raises:
        UserError: the adapter or its base cannot be used, a merged weight is not finite, or --output exists.
    """
    output = Path(config.output)
    if output.exists():
        raise UserError(f"--output {output}: expected a new folder, found one that exists")
    if not is_adapter(config.adapter):
        raise UserError(f"--adapter {config.adapter}: expected the folder of an adapter, found no adapter_config.json")
    flag, base = ("--model", config.model) if config.model else ("--adapter", base_of(config.adapter, "--adapter"))
    model = load_model(base, name=flag, trust_remote_code=config.trust_remote_code, keep_dropout=True)
    load_adapter(model, config.adapter, base, "--adapter")
    try:
        model = merge(model)
    except ValueError as error:
        raise UserError(f"--adapter {config.adapter}: cannot be merged: {' '.join(str(error).split())}") from error
    dtype = _DTYPES.get(config.dtype) or checkpoint_dtype(base, config.trust_remote_code)
    has_tokenizer = (Path(config.adapter) / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(
        config.adapter if has_tokenizer else base, trust_remote_code=config.trust_remote_code, name=flag
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        save_model(output, model.to(dtype), tokenizer)
    except OSError as error:
        raise UserError(f"--output {output}: expected a folder to write to, found: {error}") from error
    say(f"wrote {config.adapter} on {base}, merged, as {str(dtype).removeprefix('torch.')} to {output}")
    return output
