"""Does the packed forward compute what plain forwards of the same model compute? Asked on the first bin of a run.

Shapes: N completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.errors import UserError
from dpo.model import head_logps, prepare, shared_logps, stock_attention
from dpo.packing import Group, Layout, PackedBatch, group_cost, pack
from dpo.parallel import gathered_once, is_sharded
from dpo.support import length_limit

_FLOOR = {torch.float64: 1e-6, torch.float32: 1e-4}
_NOISE_FACTOR = 5.0
# two plain layouts share one attention kernel, whose rounding another kernel does not repeat
_HALF_FLOOR, _HALF_NOISE_FACTOR = 1e-1, 15.0


@dataclass(frozen=True, slots=True)
class SharingCheck:
    """Largest difference of a token's log-prob between the layout and plain forwards, the noise between two plain
    layouts, the tolerance that follows, all in nats, and how many tokens were compared."""

    max_abs_error: float
    noise: float
    tolerance: float
    num_tokens: int


def check_sharing(
    model: PreTrainedModel, groups: Sequence[Group], layout: Layout = "shared", *, max_tokens: int = 1024
) -> SharingCheck:
    """Compare the layout's log-probs with one-sequence-at-a-time forwards of the same model with its own attention.

    groups: the first bin; a subset of at most about `max_tokens` tokens of plain forwards is compared (never less than
    one group). The tolerance is 5 times the noise between two plain layouts (single rows, and rows padded to a batch;
    15 times in half precision), with a floor of the dtype. Leaves the model prepared for `layout`. Raises UserError if
    the difference is over the tolerance.
    """
    subset = _subset(_same_regime(groups, length_limit(model)), max_tokens)
    # fp32 weights are compared in fp32, which sees smaller mistakes; CUDA's variable-length attention has only half
    # precision, and the blocks of a sharded model arrive in autocast's
    low = is_sharded(model) and torch.is_autocast_enabled(model.device.type)
    wide = model.device.type == "cpu" and model.dtype in _FLOOR and not low
    autocast = torch.autocast(model.device.type, enabled=False) if wide else nullcontext()
    with torch.no_grad(), autocast, gathered_once(model):
        prepare(model, "padded")
        plain, plain_by_head = _plain_logps(model, subset)
        padded = shared_logps(model, pack(subset, layout="padded").to(model.device)).token_logps.double()
        prepare(model, layout)
        batch = pack(subset, layout=layout)
        packed = shared_logps(model, batch.to(model.device)).token_logps.double()
        # both through the fused head, so that a head that computes other logits than the model's is no noise
        noise = float((padded - plain_by_head).abs().max())
        precision = _precision(model)
    if precision in _FLOOR:
        tolerance = max(_FLOOR[precision], _NOISE_FACTOR * noise)
    else:
        tolerance = max(_HALF_FLOOR, _HALF_NOISE_FACTOR * noise)
    if not torch.isfinite(plain).all():
        row = _row_of(batch, ~torch.isfinite(plain))
        raise UserError(
            f"{type(model).__name__}: expected finite log-probs from plain forwards of the model, found others in row "
            f"{row}: its weights hold values that are not finite, or too large"
        )
    error = (packed - plain).abs()
    result = SharingCheck(float(error.max()), noise, tolerance, plain.numel())
    # written so that a difference or a noise that is not a number fails too
    if not result.max_abs_error <= tolerance < float("inf"):
        raise UserError(_message(model, layout, result, _row_of(batch, error.nan_to_num(torch.inf))))
    return result


def _row_of(batch: PackedBatch, values: Tensor) -> int | str:
    """The row whose token has the largest of `values` [N]."""
    completion = int(batch.completion_ids[int(values.to(torch.float64).argmax())])
    return batch.rows[int(batch.group_of_completion[completion])]


def _message(model: PreTrainedModel, layout: Layout, result: SharingCheck, row: int | str) -> str:
    way_out = {"shared": "use --no-share-prefix or --padded", "packed": "use --padded"}.get(layout, "report the model")
    return (
        f"{type(model).__name__}: the {layout} forward differs from plain forwards of the same model by "
        f"{result.max_abs_error:.2e} in a token's log-prob (row {row}), more than {result.tolerance:.2e} allowed: "
        f"{way_out} (--no-check-sharing trains on regardless)"
    )


def _same_regime(groups: Sequence[Group], limit: int | None) -> list[Group]:
    """The completions whose sequences are on the first one's side of the limit (see `dpo.support.length_limit`)."""
    if limit is None:
        return list(groups)

    def longer(group: Group, completion: Sequence[int]) -> bool:
        return len(group.prompt) + len(completion) > limit

    side = longer(groups[0], groups[0].completions[0])
    kept = [[y for y in group.completions if longer(group, y) == side] for group in groups]
    return [replace(group, completions=ys, pairs=(), rankings=()) for group, ys in zip(groups, kept, strict=True) if ys]


def _subset(groups: Sequence[Group], max_tokens: int) -> list[Group]:
    """Groups in order while their plain forwards stay within max_tokens; the smallest one, with two completions, if
    none does."""
    chosen, left = [], max_tokens
    for group in groups:
        cost = group_cost(group, "packed")
        if cost <= left:
            chosen.append(group)
            left -= cost
    if not chosen:
        smallest = min(groups, key=lambda group: group_cost(group, "packed"))
        chosen = [replace(smallest, completions=smallest.completions[:2])]
    return [replace(group, pairs=(), rankings=()) for group in chosen]


def _plain_logps(model: PreTrainedModel, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Log-probs [N] float64 from one ordinary call of the model a completion: by the model's own logits, and by the
    fused head from the hidden rows of the same calls."""
    own, by_head, hidden = [], [], []
    head = model.get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with stock_attention(model):
        for group in groups:
            for completion in group.completions:
                ids = torch.tensor([[*group.prompt, *completion]], device=model.device)
                # logits_to_keep spares the prompt's logits; models that do not know it return them all
                logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(completion) + 1).logits[0]
                rows = logits[-len(completion) - 1 : -1]
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                target = ids[0, -len(completion) :, None]
                own.append(rows.log_softmax(-1).gather(-1, target)[:, 0].double())
                last = hidden.pop()[0, -len(completion) - 1 : -1]
                by_head.append(head_logps(model, last, target[:, 0]).double())
    hook.remove()
    return torch.cat(own), torch.cat(by_head)


def _precision(model: PreTrainedModel) -> torch.dtype:
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
