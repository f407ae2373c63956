"""TRL's DPOTrainer on the packed forward: `patch_trl` of `dpo_kernels`, which leaves the model's forward as it is, with
another trunk.

Shapes: B sequences (all chosen, then all rejected), L length, N completion tokens of the batch, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import dpo_kernels
import numpy as np
import torch
from dpo_kernels.trl_hook import PaddedTrunk
from torch import Tensor

from dpo.checks import check_sharing
from dpo.errors import UserError
from dpo.model import prepare, stock_attention, trunk
from dpo.modes import in_evaluation
from dpo.packing import Group, PackedBatch, pack
from dpo.support import refuse_dropout


def patch_trl(target: Any) -> Any:
    """TRL's DPOTrainer with this project's packed forward, LM head and loss: same arguments, metrics and results.

    target: as of `dpo_kernels.patch_trl`, which this extends: a trainer, or the class or a subclass. Every batch is one
    row without padding, in which a prompt is computed once for all of its completions; the first batch is compared with
    plain forwards of the same weights. Evaluation's logits and whatever else calls the model get its own forward.
    ValueError names what is not honoured beside what `dpo_kernels.patch_trl` refuses: a model that cannot be packed
    exactly, dropout on attention weights, prompt tuning, neftune_noise_alpha, padding on the left.
    """
    return dpo_kernels.patch_trl(target, trunk=_SHARED)


_TAKEN = {"input_ids", "attention_mask", "use_cache", "return_dict"}


class SharedTrunk(PaddedTrunk):
    """Hidden rows from one packed row a batch."""

    def check(self, trainer: Any, models: Sequence[Any]) -> None:
        """Prepares the models. ValueError for what the packed forward would compute otherwise than TRL."""
        if trainer.args.neftune_noise_alpha:
            raise ValueError(
                "neftune_noise_alpha: patch_trl expected None, for its noise depends on the batch's layout, found "
                f"{trainer.args.neftune_noise_alpha}"
            )
        for name, config in getattr(trainer.model, "peft_config", {}).items():
            if config.is_prompt_learning:
                found = f"{name}: {config.peft_type.value}"
                raise ValueError(f"peft_config: patch_trl expected adapters of weights, found {found}")
        with _as_value_errors():
            for model in models:
                refuse_dropout(model, "shared")
                prepare(model, "shared")

    def own_forward(self, model: Any) -> AbstractContextManager:
        return stock_attention(model)

    def hidden(self, model: Any, rows: Tensor, *args: Any, **inputs: Any) -> Tensor:
        # peft passes every argument that it knows, most of them None
        others = [name for name, value in inputs.items() if value is not None and name not in _TAKEN]
        if args or others:
            raise ValueError(f"{', '.join(others) or 'inputs'}: patch_trl expected input_ids and attention_mask only")
        input_ids = inputs["input_ids"]
        groups, order = groups_of(input_ids, inputs["attention_mask"], rows)
        if not groups:  # every completion was cut off
            with stock_attention(model):
                return super().hidden(model, rows, **inputs)
        with _as_value_errors():
            _check_once(model, groups)
            return trunk(model, _in_order(pack(groups), order).to(input_ids.device))


_SHARED = SharedTrunk()


def _check_once(model: Any, groups: Sequence[Group]) -> None:
    """Compares the packed forward with plain ones, without dropout, at the model's first batch."""
    if vars(model).get("_dpo_sharing_checked"):
        return
    with in_evaluation(model):
        check_sharing(model, groups)
    vars(model)["_dpo_sharing_checked"] = True


def groups_of(input_ids: Tensor, attention_mask: Tensor, rows: Tensor) -> tuple[list[Group], list[int]]:
    """The sequences of a padded batch as groups, those of equal prompts together, those without completion left out.

    input_ids, attention_mask: [B, L], padded on the right. rows: [B, L - 1] bool, True where the next token is of the
    completion. Returns the groups, and which sequence each of their completions is, in order.

    Raises ValueError for a sequence that is not a prompt, its completion and padding.
    """
    held = torch.stack([input_ids, attention_mask, torch.nn.functional.pad(rows, (1, 0)).to(input_ids.dtype)])
    ids, attended, completed = held.cpu().numpy()  # host sync, the only one
    members: dict[bytes, list[int]] = {}
    ends, starts = attended.sum(1), completed.argmax(1)
    for b in np.flatnonzero(completed.any(1)):
        start, end = starts[b], ends[b]
        if not (attended[b, :end].all() and completed[b, start:end].all() and completed[b].sum() == end - start):
            raise ValueError(
                f"attention_mask: patch_trl expected a prompt, a completion and padding, found others in sequence {b}"
            )
        members.setdefault(ids[b, :start].tobytes(), []).append(int(b))
    groups = [
        Group(ids[found[0], : starts[found[0]]], [ids[b, starts[b] : ends[b]] for b in found], [], row=found[0])
        for found in members.values()
    ]
    return groups, [b for found in members.values() for b in found]


def _in_order(batch: PackedBatch, order: Sequence[int]) -> PackedBatch:
    """The batch with its rows for the LM head by sequence, as TRL has them. order: the sequence of each completion."""
    by_sequence = torch.argsort(torch.tensor(order)[batch.completion_ids], stable=True)
    return replace(batch, logit_rows=batch.logit_rows[by_sequence], targets=batch.targets[by_sequence])


@contextmanager
def _as_value_errors() -> Iterator[None]:
    """The errors of `dpo`, which name its flags, in terms of the hook."""
    try:
        yield
    except UserError as error:
        raise ValueError(f"{error} (with TRL: dpo_kernels.patch_trl, which keeps the model's forward)") from error
