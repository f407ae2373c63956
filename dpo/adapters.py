"""LoRA adapters through peft: put on a model in place, switched off for the reference, saved for plain peft.

The model that the trainer holds stays the Transformers model: peft's layers sit inside it, and peft's own wrapper is
kept beside it (`adapter_of`).
"""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dpo.errors import UserError
from dpo.modes import in_evaluation

TRAINED, REFERENCE = "default", "reference"
"""Names of the adapter that trains, and of the frozen copy of the adapter that training started from."""

_CONFIG = "adapter_config.json"
_PLAIN_INIT = (True, False, "gaussian")
_UNSUPPORTED = {
    "alora_invocation_tokens": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "megatron_config": None,
    "bias": "none",
    "use_qalora": False,
}
"""Fields of a LoraConfig that must keep these values: the others depend on positions, or change the base model too."""


class HeadParts(NamedTuple):
    """The tensors of an LM head: weight [V, H], bias [V] or None, and lora (a [r, H], b [V, r], scaling) or None."""

    weight: Any
    bias: Any
    lora: tuple[Any, Any, float] | None


def head_parts(linear: Any) -> HeadParts:
    """What an LM head multiplies with, as its active adapters have it (peft's wrappers hide it)."""
    if hasattr(linear, "modules_to_save"):
        off = linear.disable_adapters or not linear.active_adapters
        linear = linear.original_module if off else linear.modules_to_save[linear.active_adapters[0]]
    if not hasattr(linear, "base_layer"):
        return HeadParts(linear.weight, getattr(linear, "bias", None), None)
    base = linear.get_base_layer()
    active = () if linear.disable_adapters else [name for name in linear.active_adapters if name in linear.lora_A]
    lora = None
    for name in active:  # one at most: the trainer never mixes adapters
        lora = linear.lora_A[name].weight, linear.lora_B[name].weight, float(linear.scaling[name])
    return HeadParts(base.weight, getattr(base, "bias", None), lora)


def adapter_of(model: Any) -> Any:
    """peft's wrapper of a model that has an adapter, else None."""
    return vars(model).get("_dpo_adapter")


def factors(model: Any) -> Iterator[Any]:
    """The modules of the adapters themselves, frozen copies included."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            held = getattr(module, name, None)
            if isinstance(held, nn.Module):
                yield from held.modules()


def is_adapter(path: str | Path) -> bool:
    """Whether a folder holds an adapter of peft's."""
    return (Path(path) / _CONFIG).is_file()


def base_of(path: str, flag: str) -> str:
    """The base model that an adapter's folder names."""
    base = read_config(path, flag).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{flag} {path}: expected base_model_name_or_path in {_CONFIG}, found none")
    return str(base)


def read_config(path: str, flag: str) -> dict[str, Any]:
    """The settings of an adapter's folder, or of a file alike."""
    file = Path(path) / _CONFIG if Path(path).is_dir() else Path(path)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {path}: expected {_CONFIG} of peft, found: {reason[:200]}") from error
    if not isinstance(found, dict):
        raise UserError(f"{flag} {path}: expected the settings of an adapter, found a {type(found).__name__}")
    return found


def lora_config(
    r: int, *, alpha: float | None = None, dropout: float = 0.0, targets: str = "all-linear", flag: str = "--lora-r"
) -> Any:
    """peft's LoraConfig of the flags. targets: all-linear (all but the head), or module names with commas between."""
    names = "all-linear" if targets == "all-linear" else [name.strip() for name in targets.split(",")]
    return _peft(flag).LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )


def config_from_file(path: str, flag: str) -> Any:
    """peft's LoraConfig of a file of its own format."""
    settings = read_config(path, flag) | {"task_type": "CAUSAL_LM", "inference_mode": False}
    kind = settings.pop("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{flag} {path}: expected peft_type LORA, found {kind}")
    known = _peft(flag).LoraConfig.__dataclass_fields__
    for name in set(settings) - set(known):
        # other versions of peft write fields of their own, which do nothing unless they are set
        if settings.pop(name):
            raise UserError(f"{flag} {path}: expected settings of peft's LoraConfig, found {name!r}")
    try:
        return _peft(flag).LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"{flag} {path}: {' '.join(str(error).split())}") from error


def add_adapter(model: Any, config: Any, base: str, flag: str, *, on_meta: bool = False) -> None:
    """Puts a new adapter on a model, in place: its product is 0 until it has trained, everything else is frozen.

    Args:
        base: what loads the base model, for the adapter's own record.
        on_meta: its tensors have shapes only.
    Raises:
        UserError: the configuration names modules that are not there, or something that is not supported.
    """
    _check(config, flag)
    _check_targets(model, config, flag)
    _wrap(model, config, base, flag, on_meta=on_meta)
    _check_head(model, config, flag)


def load_adapter(model: Any, path: str, base: str, flag: str) -> None:
    """Puts a saved adapter on its base model, in place, ready to train on.

    Args:
        base: what loads the base model, for the adapter's own record.
    Raises:
        UserError: it is not a LoRA adapter, or it does not fit the model.
    """
    config = config_from_file(path, flag)
    _check(config, flag)
    _load_weights(_wrap(model, config, base, flag), path, TRAINED, flag)
    _check_head(model, config, flag)


def load_reference(model: Any, path: str, flag: str) -> None:
    """Adds a saved adapter to a model that has one, frozen: `as_reference` puts it in the other's place."""
    adapter_of(model).add_adapter(REFERENCE, config_from_file(path, flag))
    _load_weights(adapter_of(model), path, REFERENCE, flag)
    model.eval()


def _load_weights(wrapper: Any, path: str, name: str, flag: str) -> None:
    try:
        found = wrapper.load_adapter(path, name, is_trainable=name == TRAINED)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {path}: cannot be put on its base: {reason[:300]}") from error
    wrong = [key for key in found.missing_keys if f".{name}." in key] + list(found.unexpected_keys)
    if wrong:
        raise UserError(f"{flag} {path}: expected the weights of its configuration, found another set: {wrong[0]}")
    wrapper.set_adapter(TRAINED)


@contextmanager
def as_reference(model: Any) -> Iterator[None]:
    """Inside, a model computes what its reference does: no dropout, the adapter off (its frozen starting copy on)."""
    wrapper = adapter_of(model)
    with in_evaluation(model):
        if wrapper is not None:
            _switch(wrapper, on=False)
        try:
            yield
        finally:
            if wrapper is not None:
                _switch(wrapper, on=True)


def _switch(wrapper: Any, *, on: bool) -> None:
    trains = {p: p.requires_grad for p in wrapper.parameters()}
    if REFERENCE in wrapper.peft_config:
        wrapper.set_adapter(TRAINED if on else REFERENCE)
    elif on:
        wrapper.base_model.enable_adapter_layers()
    else:
        wrapper.base_model.disable_adapter_layers()
    # peft says with it what trains; here that never changes, and ranks that share the weights count on it
    for p, value in trains.items():
        p.requires_grad_(value)


def save_adapter(folder: Path, model: Any, weights: Mapping[str, Tensor] | None = None) -> None:
    """Writes the trained adapter as plain peft loads it.

    weights: what trains, by the model's names, whole; needed where ranks hold parts of it.
    """
    wrapper = adapter_of(model)
    given = None if weights is None else {f"base_model.model.{name}": value for name, value in weights.items()}
    # the base's embedding is not part of it, and peft would ask a hub whether it is
    wrapper.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False, state_dict=given)


def merge(model: Any) -> Any:
    """Adds the adapter's products to the weights and takes peft's layers out. Returns the plain model.

    An LM head that shares its weight with the embedding gets one of its own where the adapter changes either.
    """
    wrapper = adapter_of(model)
    if model.config.get_text_config(decoder=True).tie_word_embeddings and _touches_tied(model):
        head = model.get_output_embeddings()
        plain = head.original_module if hasattr(head, "original_module") else getattr(head, "base_layer", head)
        plain.weight = type(plain.weight)(plain.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
    merged = wrapper.merge_and_unload(safe_merge=True)
    del vars(merged)["_dpo_adapter"]
    return merged


def _touches_tied(model: Any) -> bool:
    return any(
        hasattr(module, "base_layer") or hasattr(module, "modules_to_save")
        for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )


def _peft(flag: str) -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise UserError(f"{flag}: needs the package peft: pip install 'fused-dpo[lora]'") from error


def _wrap(model: Any, config: Any, base: str, flag: str, *, on_meta: bool = False) -> Any:
    with warnings.catch_warnings():
        # of tied weights, which `merge` parts
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
        try:
            wrapper = _peft(flag).get_peft_model(model, config, adapter_name=TRAINED, low_cpu_mem_usage=on_meta)
        except (ValueError, TypeError) as error:
            raise UserError(f"{flag}: {' '.join(str(error).split())[:300]}") from error
    local = Path(base)
    wrapper.peft_config[TRAINED].base_model_name_or_path = str(local.resolve()) if local.exists() else base
    vars(model)["_dpo_adapter"] = wrapper
    model.eval()
    return wrapper


def _check(config: Any, flag: str) -> None:
    for name, expected in _UNSUPPORTED.items():
        found = getattr(config, name, expected)
        if found != expected:
            raise UserError(f"{flag}: {name}: expected {expected}, found {found}")
    if config.init_lora_weights not in _PLAIN_INIT:
        # PiSSA, OLoRA and the like change the base's weights: with the adapter off, it is another model
        raise UserError(
            f"{flag}: init_lora_weights: expected {', '.join(map(str, _PLAIN_INIT))}, found {config.init_lora_weights}"
        )


def _check_targets(model: Any, config: Any, flag: str) -> None:
    """peft is content when one of the names is there."""
    names = config.target_modules
    if isinstance(names, str):
        return
    modules = [path for path, _ in model.named_modules()]
    for name in sorted(names):
        if not any(path == name or path.endswith("." + name) for path in modules):
            raise UserError(f"{flag}: expected names of modules of {type(model).__name__}, found {name!r}")


def _check_head(model: Any, config: Any, flag: str) -> None:
    head = model.get_output_embeddings()
    if not hasattr(head, "base_layer"):
        return
    if config.lora_dropout:
        raise UserError(
            f"{flag}: expected no dropout in an adapter of the LM head, found lora_dropout {config.lora_dropout}"
        )
    for name in ("use_dora", "lora_bias"):
        if getattr(config, name, False):
            raise UserError(f"{flag}: expected a plain adapter of the LM head, found {name}")
