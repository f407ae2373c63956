"""token_pair_loss: from log-probs per token to the preference loss and its gradient per token.

Shapes: N rows, C completions, T pairs. All arithmetic is float64.
Order: sums over completions, LD-DPO's prefixes, WPO's weights, autograd, checks, public function.
"""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .calls import PairCall
from .common import check_float, check_index, check_same_device, check_shape
from .formulas import Side
from .losses import LossOptions
from .pairs import (
    PairLoss,
    Slopes,
    check_call,
    check_pairs,
    completion_gradient,
    pair_gradient,
    pair_terms,
    reduce_pairs,
)


@dataclass(frozen=True, slots=True)
class Segments:
    """Which completion each row belongs to."""

    slots: Tensor
    """[N] int64: completion, or C for a row of none. That slot is cut off: no data-dependent shapes."""
    completions: int

    @classmethod
    def of(cls, completion_ids: Tensor, completions: int) -> "Segments":
        return cls(completion_ids.where(completion_ids >= 0, completions), completions)

    def sum(self, values: Tensor) -> Tensor:
        """[C] float64 sums of values [N]; what a row of no completion holds does not matter."""
        values = values.double().where(self.slots < self.completions, 0.0)
        out = values.new_zeros(self.completions + 1)
        return out.index_add_(0, self.slots, values)[: self.completions]

    def lengths(self) -> Tensor:
        """[C] float64 tokens of each completion."""
        return self.sum(torch.ones_like(self.slots))


@dataclass(frozen=True, slots=True)
class Prefixes:
    """The first tokens of either side of each pair, as many as its shorter side has (LD-DPO's shared part)."""

    order: Tensor
    """[N]: rows sorted by completion, otherwise as they come; those of no completion last."""
    start: Tensor
    """[C] place of each completion's first row in that order."""
    end: Tensor
    """[N] of each place in that order the end of its completion."""
    shared: Tensor
    """[T]"""

    @classmethod
    def of(cls, segments: Segments, lengths: Tensor, chosen: Tensor, rejected: Tensor) -> "Prefixes":
        lengths = lengths.long()
        order = segments.slots.argsort(stable=True)
        end = lengths.cumsum(0)
        ends = torch.cat([end, end.new_tensor([order.numel()])])[segments.slots[order]]
        return cls(order, end - lengths, ends, torch.minimum(lengths[chosen], lengths[rejected]))

    def sum(self, values: Tensor, side: Tensor) -> Tensor:
        """[T] sums of values [N] over the shared part of the completions `side` [T]."""
        running = _running_sums(values[self.order])
        return running[self.start[side] + self.shared] - running[self.start[side]]

    def spread(self, slopes: tuple[Tensor, Tensor], sides: tuple[Tensor, Tensor]) -> Tensor:
        """[N] for each row the sum of the slopes [T] of the pairs that have it in their shared part."""
        count = self.order.numel()
        last = slopes[0].new_zeros(count + 1)
        for slope, side in zip(slopes, sides, strict=True):
            last.index_add_(0, (self.start[side] + self.shared - 1).where(self.shared > 0, count), slope)
        # a row is in the shared parts that end at it or further on in its completion
        running = _running_sums(last[:count])
        return torch.empty_like(running[:count]).index_copy_(0, self.order, running[self.end] - running[:count])


def _running_sums(values: Tensor) -> Tensor:
    """[N + 1] sums of the values before each place."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])


def completion_deltas(logps: Tensor, ref_logps: Tensor | None, completion_ids: Tensor, completions: int) -> Tensor:
    """[C] float64 log ratios. Per-token references are subtracted token by token, in float64, before the sum."""
    segments = Segments.of(completion_ids, completions)
    if ref_logps is None:
        return segments.sum(logps)
    if ref_logps.numel() == logps.numel():
        return segments.sum(logps.double() - ref_logps.double())
    return segments.sum(logps) - ref_logps.double()


def sides_of(
    logps: Tensor, ref: Tensor | None, segments: Segments, chosen: Tensor, rejected: Tensor, call: PairCall
) -> tuple[Side, Side, Prefixes | None]:
    """What the formulas take, with LD-DPO's weights where the call asks for them."""
    lp = logps.double()
    per_token = ref is not None and ref.numel() == lp.numel()
    base = torch.zeros_like(lp) if ref is None or not per_token else ref.double()
    counted = segments.lengths() if call.lengths or call.rows else None
    length = torch.ones(segments.completions, device=lp.device, dtype=lp.dtype) if counted is None else counted
    logp, total = segments.sum(lp), segments.sum(base)
    delta = segments.sum(lp - base) if per_token else logp
    if ref is not None and not per_token:
        total = ref.double()
        delta = logp - total
    sides = [Side(*(part[side] for part in (delta, total, logp, length.clamp(min=1)))) for side in (chosen, rejected)]
    if call.ld_alpha == 1.0:
        return sides[0], sides[1], None
    prefixes, alpha = Prefixes.of(segments, length, chosen, rejected), call.ld_alpha
    inside = segments.slots < segments.completions
    for k, side in enumerate((chosen, rejected)):

        def weighted(values: Tensor, sums: Tensor, side: Tensor = side) -> Tensor:
            return alpha * sums[side] + (1.0 - alpha) * prefixes.sum(values.where(inside, 0.0), side)

        if call.ld_reference:
            sides[k] = sides[k]._replace(delta=weighted(lp - base, delta), ref=weighted(base, total))
        else:
            sides[k] = sides[k]._replace(delta=weighted(lp, logp) - total[side])
    return sides[0], sides[1], prefixes


def wpo_weights(logps: Tensor, log_sum_sq: Tensor, segments: Segments, chosen: Tensor, rejected: Tensor) -> Tensor:
    """[T] e^(a_w + a_l), a the mean over a completion's tokens of lp_t - log sum_v p_t(v)^2.

    Zhou et al. 2024, arXiv:2406.11827, eq. 2 with sampled alignment: a token weighs 1 where the policy draws it as
    often as it draws anything twice.
    """
    mean = segments.sum(logps.double() - log_sum_sq.double()) / segments.lengths().clamp(min=1)
    return (mean[chosen] + mean[rejected]).exp()


class _TokenPairLoss(torch.autograd.Function):
    """Token log-probs [N] to loss and rewards; reference, weights and statistics are constants."""

    @staticmethod
    def forward(
        ctx,
        logps: Tensor,
        ref: Tensor | None,
        completion_ids: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        weights: Tensor | None,
        log_sum_sq: Tensor | None,
        completions: int,
        call: PairCall,
    ):
        segments = Segments.of(completion_ids, completions)
        won, lost, prefixes = sides_of(logps, ref, segments, chosen, rejected, call)
        if log_sum_sq is not None:
            likely = wpo_weights(logps, log_sum_sq, segments, chosen, rejected)
            weights = likely if weights is None else likely * weights.double()
        terms = pair_terms(won, lost, weights, call)
        ctx.call, ctx.segments, ctx.prefixes, ctx.dtype = call, segments, prefixes, logps.dtype
        ctx.save_for_backward(*terms.slopes, chosen, rejected)
        rewards = terms.chosen_rewards.to(logps.dtype), terms.rejected_rewards.to(logps.dtype)
        ctx.mark_non_differentiable(*rewards)
        return reduce_pairs(terms.losses, call.reduction).to(logps.dtype), *rewards

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        *slopes, chosen, rejected = ctx.saved_tensors
        slopes, call, segments = Slopes(*slopes), ctx.call, ctx.segments
        sides = slopes.sides
        if ctx.prefixes is not None:
            alpha = call.ld_alpha
            sides = alpha * slopes[0] + slopes[2], alpha * slopes[1] + slopes[3]
        size = segments.completions + 1
        rows = completion_gradient(sides, chosen, rejected, grad_outputs[0], size, call)[segments.slots]
        if ctx.prefixes is not None:
            scale = (1.0 - call.ld_alpha) * pair_gradient(grad_outputs[0], chosen.numel(), call)
            rows = rows + ctx.prefixes.spread((scale * slopes[0], scale * slopes[1]), (chosen, rejected))
        return rows.to(ctx.dtype), *(None,) * 8


def check_segments(
    rows: Tensor,
    ref_logps: Tensor | None,
    completion_ids: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    num_completions: int | None,
    pair_weights: Tensor | None,
    call: PairCall,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """completion_ids [N], chosen and rejected [T] as int64, and C, checked against `rows` [N]."""
    check_call(call, ref_logps, pair_weights)
    size = rows.numel()
    check_shape("completion_ids", completion_ids, (size,), "one a row")
    completion_ids = check_index("completion_ids", completion_ids, None)
    if num_completions is None:
        if ref_logps is not None and ref_logps.numel() != size:
            num_completions = ref_logps.numel()
        else:
            named = [part for part in (completion_ids, chosen, rejected) if part.numel()]
            num_completions = max((int(part.max()) + 1 for part in named), default=0)
    check_index("completion_ids", completion_ids, num_completions, lower=-1)
    chosen, rejected = check_pairs(chosen, rejected, pair_weights, num_completions)
    check_same_device(rows=rows, ref_logps=ref_logps, completion_ids=completion_ids, chosen=chosen)
    if ref_logps is not None:
        _check_reference(ref_logps, completion_ids, num_completions, call)
    return completion_ids, chosen, rejected, num_completions


def _check_reference(ref_logps: Tensor, completion_ids: Tensor, completions: int, call: PairCall) -> None:
    check_float("ref_logps", ref_logps)
    size = completion_ids.numel()
    if ref_logps.dim() != 1 or ref_logps.numel() not in (size, completions):
        raise ValueError(
            f"ref_logps: expected shape [{size}] (one a row) or [{completions}] (one a completion), "
            f"found {list(ref_logps.shape)}"
        )
    if call.ld_alpha != 1.0 and ref_logps.numel() != size:
        raise ValueError(f"ref_logps: ld_alpha needs one a row: expected shape [{size}], found {list(ref_logps.shape)}")
    ambiguous = size == completions and completion_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if ambiguous and not torch.equal(completion_ids, torch.arange(size)):
        raise ValueError(
            f"ref_logps: [{size}] could be one a row or one a completion, and completion_ids are not 0, 1, 2, ...: "
            "the two readings differ"
        )


def segment_pair_loss(
    logps: Tensor,
    ref_logps: Tensor | None,
    completion_ids: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    num_completions: int | None,
    pair_weights: Tensor | None,
    log_sum_sq: Tensor | None,
    call: PairCall,
) -> PairLoss:
    """Checks, then loss and rewards of token log-probs [N]."""
    ids, chosen, rejected, completions = check_segments(
        logps, ref_logps, completion_ids, chosen, rejected, num_completions, pair_weights, call
    )
    if (log_sum_sq is None) == call.wpo:
        raise ValueError(f"log_sum_sq: expected {'one a row' if call.wpo else 'None'} with wpo={call.wpo}")
    if log_sum_sq is not None:
        check_shape("log_sum_sq", log_sum_sq, logps.shape, "one a row")
        log_sum_sq = log_sum_sq.detach()
    tensors = logps, ref_logps, ids, chosen, rejected, pair_weights, log_sum_sq
    return PairLoss(*_TokenPairLoss.apply(*tensors, completions, call))


def token_pair_loss(
    token_logps: Tensor,
    ref_logps: Tensor | None,
    completion_ids: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    loss: str = "sigmoid",
    beta: float = 0.1,
    reduction: str = "mean",
    pair_weights: Tensor | None = None,
    log_sum_sq: Tensor | None = None,
    num_completions: int | None = None,
    **options: Unpack[LossOptions],
) -> PairLoss:
    """Preference loss from log-probs per token, on torch: the gradient is one number a token.

    token_logps [N] (from `token_logps`, `linear_token_logps`, any model); completion_ids [N] in [0, C) say which
    completion a token belongs to (-1: none), its tokens in order; ref_logps [N], [C] or None and the rest as
    `linear_dpo_loss`. log_sum_sq [N], for `wpo` alone: the statistic of that name from the same logits.
    """
    check_float("token_logps", token_logps)
    if token_logps.dim() != 1:
        raise ValueError(f"token_logps: expected shape [N], found {list(token_logps.shape)}")
    call = PairCall.check(loss, beta, reduction, **options)
    return segment_pair_loss(
        token_logps, ref_logps, completion_ids, chosen, rejected, num_completions, pair_weights, log_sum_sq, call
    )
