"""Loading a causal LM and its tokenizer, with one-line errors."""

from __future__ import annotations

import importlib.util
import json
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING
from transformers.utils import logging as transformers_logging

from dpo.errors import UserError

_LOG = logging.getLogger("dpo")
_BROKEN = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError),
)
"""What the loaders of Transformers raise on files that are damaged, incomplete, or of another kind."""
_DROPOUT = re.compile(r"(^|_)(dropout|drop|pdrop|layerdrop)(_|$)|dropout")


def load_model(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    keep_dropout: bool = False,
    in_4bit_on: torch.device | None = None,
    name: str = "--model",
) -> PreTrainedModel:
    """Load a causal LM for training: weights in `dtype`, no key-value cache, dropout 0 unless `keep_dropout`.

    path: a folder, a model id, a `.gguf` file, or a folder that holds one. in_4bit_on: put it on this device with its
    linear layers (but the head) in 4 bits, to train an adapter on. name: the flag that errors name.
    Raises UserError when nothing is there, when it is not a causal LM, or when weights are missing from the checkpoint.
    """
    options = _source(path, name)
    config = load_config(path, trust_remote_code=trust_remote_code, name=name)
    if not keep_dropout:
        zeroed = zero_dropout(config)
        if zeroed:
            _LOG.warning("%s: dropout set to 0: %s", name, ", ".join(zeroed))
    quantized = {} if in_4bit_on is None else _four_bits(in_4bit_on, path, config, options)
    model, info = _load(
        AutoModelForCausalLM.from_pretrained,
        name,
        path,
        **options,
        **quantized,
        config=config,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"{name} {path}: expected every weight, found {len(missing)} missing, the first {missing[0]!r}")
    if "gguf_file" in options:
        _forget_gguf(model)
    elif getattr(model, "hf_quantizer", None) is not None and not getattr(model.hf_quantizer, "is_trainable", False):
        kind = getattr(model.hf_quantizer.quantization_config, "quant_method", "unknown")
        raise UserError(f"{name} {path}: expected plain weights, found weights quantized with {kind}, not trainable")
    model.config.use_cache = False
    return model


def load_config(path: str, *, trust_remote_code: bool = False, name: str = "--model") -> Any:
    """Load a model's configuration. Raises UserError when there is none, or when it is not of a causal LM."""
    config = _load(AutoConfig.from_pretrained, name, path, **_source(path, name), trust_remote_code=trust_remote_code)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise UserError(f"{name} {path}: expected a causal language model, found an encoder ({config.model_type})")
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if config.is_encoder_decoder or not (remote or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        raise UserError(f"{name} {path}: expected a causal language model, found model type {config.model_type!r}")
    return config


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _four_bits(device: torch.device, path: str, config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `from_pretrained` for weights in 4 bits on a device."""
    if device.type != "cuda":
        raise UserError(f"--load-in-4bit: expected a CUDA device, found {device}")
    if not _installed("bitsandbytes"):
        raise UserError("--load-in-4bit: needs the package bitsandbytes: pip install bitsandbytes")
    if "gguf_file" in options or getattr(config, "quantization_config", None) is not None:
        raise UserError(f"--load-in-4bit: expected a checkpoint of plain weights, found {path}, quantized already")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def checkpoint_dtype(path: str, trust_remote_code: bool = False, name: str = "--model") -> torch.dtype:
    """The precision that a checkpoint's configuration names; fp32 where it names none."""
    config = load_config(path, trust_remote_code=trust_remote_code, name=name)
    dtype = getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def load_tokenizer(
    path: str, *, trust_remote_code: bool = False, name: str = "--model", **options: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, or of an adapter's folder. Raises UserError when there is none."""
    found = {} if (Path(path) / "tokenizer_config.json").is_file() else _source(path, name)
    options = {**found, **options}
    return _load(AutoTokenizer.from_pretrained, name, path, **options, trust_remote_code=trust_remote_code)


def eos_token_ids(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Every end-of-sequence id of the model, the tokenizer's own first (it is the one to append); empty when there is
    none."""
    found: list[int] = []
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found += _as_ids(tokenizer.eos_token_id)
    for config in () if model is None else (getattr(model, "generation_config", None), model.config):
        found += _as_ids(getattr(config, "eos_token_id", None))
    return list(dict.fromkeys(found))


def _as_ids(ids: Any) -> list[int]:
    return [ids] if isinstance(ids, int) else list(ids or ())


def _source(path: str, name: str) -> dict[str, Any]:
    """Options of `from_pretrained` that find a GGUF file; folders that hold no model are refused before they are
    searched for online."""
    local = Path(path)
    if local.is_file():
        if local.suffix != ".gguf":
            raise UserError(f"{name} {path}: expected a folder, a model id or a .gguf file, found another file")
        return {"gguf_file": local.name, "subfolder": ""}
    if local.is_dir():
        if not (local / "config.json").exists():
            files = sorted(local.glob("*.gguf"))
            if len(files) != 1:
                raise UserError(f"{name} {path}: expected config.json or one .gguf file in the folder, found neither")
            return {"gguf_file": files[0].name}
        _check_index(local, name)
    elif local.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise UserError(f"{name} {path}: expected a folder with a model, found no such folder")
    return {}


def _check_index(folder: Path, name: str) -> None:
    """Refuses an index of weights that leads out of the folder."""
    for index in folder.glob("*.index.json"):
        try:
            files = {str(file) for file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except _BROKEN as error:
            raise UserError(f"{name} {index}: expected a weight_map of files, found: {error!r}") from error
        for file in sorted(files):
            if Path(file).name != file or file in ("", ".", ".."):
                raise UserError(f"{name} {index}: expected names of files beside it, found {file!r}")


def _load(function: Any, name: str, path: str, **options: Any) -> Any:
    options = dict(options)
    local = Path(path)
    source = str(local.parent) if local.is_file() else path
    options.pop("subfolder", None)
    verbosity = transformers_logging.get_verbosity()
    # its reports of missing and mismatched weights, many lines each, come back to us as values or errors
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        return function(source, **options)
    except pickle.UnpicklingError as error:
        raise UserError(f"{name} {path}: expected weights, found a pickle that holds more: it is not loaded") from error
    # a damaged file may raise anything: struct.error, SafetensorError, TypeError, errors of validators and converters
    except Exception as error:
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise UserError(
                f"{name} {path}: brings code of its own: read it, then allow it with --trust-remote-code"
            ) from error
        if "ignore_mismatched_sizes" in reason:
            reason = "the weights have other sizes than config.json says"
        raise UserError(f"{name} {path}: cannot be loaded: {reason[:300]}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def zero_dropout(config: Any) -> list[str]:
    """Set every dropout probability of a configuration to 0; returns what they were."""
    changed = []
    for part in {id(part): part for part in (config, config.get_text_config(decoder=True))}.values():
        for field, value in list(vars(part).items()):
            if _DROPOUT.search(field) and isinstance(value, float) and value > 0:
                setattr(part, field, 0.0)
                changed.append(f"{field} {value}")
    return changed


def _forget_gguf(model: Any) -> None:
    """Weights out of a GGUF file are plain, but Transformers keeps the model marked as quantized: it could be neither
    saved nor trained."""
    model.hf_quantizer = None
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if hasattr(config, "quantization_config"):
            del config.quantization_config
    for attribute in ("quantization_method", "_is_quantized_training_enabled"):
        if attribute in vars(model):
            delattr(model, attribute)
