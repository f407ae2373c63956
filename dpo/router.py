"""The load-balancing loss of mixtures of experts, over all tokens of a step.

    loss = E * sum_e f_e * P_e

f_e is how many of the tokens' choices went to expert e, over the tokens of all layers; P_e is the mean probability that
the routers gave it (Fedus et al. 2021, arXiv:2101.03961, equations 4 to 6, with all layers taken together, as
Transformers does). Both are means over the whole step. A token counts once, a prompt that is repeated too: so the value
does not depend on bins, layout or ranks. f has no gradient; dloss/dp_te = E * f_e / tokens needs f of the whole step
before any backward, which is what the two-phase form is for.

S tokens of a batch, L layers with a router, E experts.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo.distributed import all_sum
from dpo.errors import UserError

_ARGUMENTS = ["gate_logits", "num_experts", "top_k", "attention_mask"]


@dataclass(frozen=True)
class Routed:
    """What the routers of a model did with the tokens of a batch that count: sums over tokens and layers, float64.

    probabilities: [E] of each expert, differentiable. choices: [E] how often each was among a token's experts. tokens:
    scalar, tokens times layers.
    """

    probabilities: Tensor
    choices: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class Balance:
    """The loss of a step, a scalar, and its gradient [E] for `Routed.probabilities` of any of its batches."""

    loss: Tensor
    gradient: Tensor


def experts_of(model: PreTrainedModel) -> tuple[int, int]:
    """The number of experts, and how many of them a token goes to.

    Raises:
        UserError: the model has no router, or not the load-balancing loss of above in Transformers.
    """
    name, decoder = type(model).__name__, model.get_decoder()
    if "router_logits" not in (getattr(type(decoder), "_can_record_outputs", None) or {}):
        raise UserError(f"--router-aux-loss: expected a mixture of experts, found {name}, which has no router")
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]  # FSDP puts a class of its own in front
    function = next((f for m in modules if (f := getattr(m, "load_balancing_loss_func", None))), None)
    known = function is not None and list(inspect.signature(function).parameters) == _ARGUMENTS
    held: Any = model
    if not known or not hasattr(held, "num_experts") or not hasattr(held, "num_experts_per_tok"):
        raise UserError(
            f"--router-aux-loss: expected a model with the load-balancing loss of Mixtral, found {name}, "
            "whose routers Transformers balances otherwise or not at all"
        )
    return held.num_experts, held.num_experts_per_tok


def routed(router_logits: Sequence[Tensor], counted: Tensor, experts: tuple[int, int]) -> Routed:
    """Sums over a batch.

    Args:
        router_logits: of every layer, [S, E] or [B, S / B, E]. counted: [S] bool, the tokens that count.
        experts: of `experts_of`.
    """
    number, top_k = experts
    weights = counted.to(torch.float64)
    probabilities = torch.zeros(number, dtype=torch.float64, device=counted.device)
    choices = torch.zeros_like(probabilities)
    for logits in router_logits:
        flat = logits.reshape(-1, number)
        p = flat.to(torch.promote_types(flat.dtype, torch.float32)).softmax(-1)
        probabilities = probabilities + (p * weights[:, None].to(p.dtype)).sum(0, dtype=torch.float64)
        chosen = p.detach().topk(top_k, dim=-1).indices
        choices.index_add_(0, chosen.flatten(), weights.repeat_interleave(top_k))
    return Routed(probabilities, choices, weights.sum() * len(router_logits))


def balance(parts: Sequence[Routed]) -> Balance:
    """The loss of a step from all of its batches on all ranks."""
    number = parts[0].choices.numel()
    rows = [torch.cat([p.choices, p.probabilities.detach(), p.tokens[None]]) for p in parts]
    sums = all_sum(torch.stack(rows).sum(0))
    tokens = sums[-1]
    gradient = number * sums[:number] / tokens.square()
    return Balance(gradient @ sums[number:-1], gradient)
