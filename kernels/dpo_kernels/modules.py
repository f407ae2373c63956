"""The losses as modules, for loops that build theirs from modules.

Shapes: N rows, V vocabulary, H hidden, C completions, L length, T pairs.
"""

from typing import Unpack

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .calls import PairCall
from .fused import LinearPairLoss, dpo_loss_from_logits, linear_dpo_loss
from .head import LoraFactors
from .losses import LossOptions
from .sharding import name_of


def halves(completions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """chosen and rejected of a batch laid out as other trainers do: all chosen, then all rejected."""
    if completions % 2:
        raise ValueError(f"chosen: without pairs, expected an even number of completions, found {completions}")
    index = torch.arange(completions, device=device)
    return index[: completions // 2], index[completions // 2 :]


class _PairModule(nn.Module):
    def __init__(
        self,
        beta: float = 0.1,
        *,
        loss: str = "sigmoid",
        reduction: str = "mean",
        ignore_index: int = -100,
        temperature: float = 1.0,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        shift: bool = False,
        backend: str | None = None,
        **loss_options: Unpack[LossOptions],
    ) -> None:
        super().__init__()
        PairCall.check(loss, beta, reduction, **loss_options)
        self.options = {
            "beta": beta,
            "loss": loss,
            **loss_options,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "temperature": temperature,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "backend": backend,
        }
        self.shift = shift

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())

    def _align(self, rows: Tensor, targets: Tensor, ref_logps: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """With `shift`, position t is predicted by row t - 1, as Transformers' labels mean it."""
        if not self.shift:
            return rows, targets, ref_logps
        if targets.dim() != 2:
            raise ValueError(f"targets: shift=True expected shape [C, L], found {list(targets.shape)}")
        if ref_logps is not None and ref_logps.shape == targets.shape:
            ref_logps = ref_logps[:, 1:]
        return rows[:, :-1], targets[:, 1:], ref_logps


class DPOLoss(_PairModule):
    """`dpo_loss_from_logits` as a module; padded [C, L, V] or packed [N, V] logits."""

    def forward(
        self,
        logits: Tensor,
        targets: Tensor,
        ref_logps: Tensor | None = None,
        *,
        completion_ids: Tensor | None = None,
        chosen: Tensor | None = None,
        rejected: Tensor | None = None,
        pair_weights: Tensor | None = None,
        num_completions: int | None = None,
    ) -> LinearPairLoss:
        """logits [C, L, V] with targets [C, L] padded by ignore_index (chosen first, then rejected, unless pairs are
        given), or logits [N, V] with targets and completion_ids [N] and pairs. ref_logps per token, or [C]."""
        logits, targets, ref_logps = self._align(logits, targets, ref_logps)
        chosen, rejected = _pairs(targets, completion_ids, chosen, rejected)
        return dpo_loss_from_logits(
            logits,
            targets,
            completion_ids,
            ref_logps,
            chosen,
            rejected,
            pair_weights=pair_weights,
            num_completions=num_completions,
            **self.options,
        )


class LinearDPOLoss(_PairModule):
    """`linear_dpo_loss` as a module; padded [C, L, H] or packed [N, H] hidden states."""

    def __init__(
        self,
        beta: float = 0.1,
        *,
        plan: str = "auto",
        workspace_bytes: int | None = None,
        process_group: ProcessGroup | str | None = None,
        **options,
    ) -> None:
        super().__init__(beta, **options)
        self.options |= {"plan": plan, "workspace_bytes": workspace_bytes, "process_group": name_of(process_group)}

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        ref_logps: Tensor | None = None,
        *,
        bias: Tensor | None = None,
        lora: LoraFactors | tuple[Tensor, Tensor, float] | None = None,
        completion_ids: Tensor | None = None,
        chosen: Tensor | None = None,
        rejected: Tensor | None = None,
        pair_weights: Tensor | None = None,
        num_completions: int | None = None,
    ) -> LinearPairLoss:
        """As `DPOLoss`, with hidden [C, L, H] or [N, H] and the LM head's weight [V, H], bias [V] and LoRA factors."""
        hidden, targets, ref_logps = self._align(hidden, targets, ref_logps)
        chosen, rejected = _pairs(targets, completion_ids, chosen, rejected)
        if completion_ids is None:
            num_completions = targets.shape[0]
            completion_ids = torch.arange(num_completions, device=targets.device).unsqueeze(1).expand_as(targets)
        if ref_logps is not None and ref_logps.shape == targets.shape:
            ref_logps = ref_logps.reshape(-1)
        found = linear_dpo_loss(
            hidden.reshape(-1, hidden.shape[-1]),
            weight,
            targets.reshape(-1),
            completion_ids.reshape(-1),
            ref_logps,
            chosen,
            rejected,
            bias=bias,
            lora=lora,
            pair_weights=pair_weights,
            num_completions=num_completions,
            **self.options,
        )
        return found._replace(token_logps=found.token_logps.view(targets.shape))


def _pairs(
    targets: Tensor, completion_ids: Tensor | None, chosen: Tensor | None, rejected: Tensor | None
) -> tuple[Tensor, Tensor]:
    if (chosen is None) != (rejected is None):
        raise ValueError("rejected: expected together with chosen, found one of the two")
    if chosen is not None and rejected is not None:
        return chosen, rejected
    if completion_ids is not None or targets.dim() != 2:
        raise ValueError("chosen: expected pairs with packed rows, found None")
    return halves(targets.shape[0], targets.device)
