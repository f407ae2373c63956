"""The update: clipping and the non-finite check folded into one fused optimizer pass, without a host sync."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer


class RMSprop(Optimizer):
    """torch.optim.RMSprop's update (no momentum, not centred) in one fused pass over gradient, state and parameter.

    RMSprop is Adam with beta1 = 0 and no bias correction: the fused Adam kernel computes it when its first moment is
    the gradient's own memory and its step count is infinite. From that kernel it inherits `grad_scale` (gradients are
    divided by it) and `found_inf` (nothing is touched where it is 1), in the protocol of torch.amp.GradScaler.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update from the parameters' gradients, which it may overwrite."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p]["square_avg"] = torch.zeros_like(p)
            self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for p in params:
            by_kind.setdefault((p.device, p.dtype), []).append(p)
        for (device, _), held in by_kind.items():
            grads = [p.grad for p in held if p.grad is not None]
            forever = torch.full((), torch.inf, device=device)
            torch._fused_adam_(  # pyright: ignore[reportPrivateImportUsage]
                held,
                grads,
                grads,
                [self.state[p]["square_avg"] for p in held],
                [],
                [forever] * len(held),
                lr=float(group["lr"]),
                beta1=0.0,
                beta2=group["alpha"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                grad_scale=getattr(self, "grad_scale", None),
                found_inf=getattr(self, "found_inf", None),
            )


def build_optimizer(name: str, params: Iterable[Tensor], *, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """The optimizer of `--optimizer`; both take `grad_scale` and `found_inf`, which `apply_update` gives."""
    if name == "rmsprop":
        return RMSprop(params, lr=lr, weight_decay=weight_decay)
    assert name == "adamw", name
    return AdamW(params, lr=lr, weight_decay=weight_decay, fused=True)


def warmup_then_constant(step: int, lr: float, warmup_steps: int) -> float:
    """Learning rate of step 0, 1, ...: rises linearly over `warmup_steps`, then stays (the paper's Appendix B)."""
    return lr * min(1.0, (step + 1) / (warmup_steps + 1))


def set_lr(optimizer: Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


@dataclass(frozen=True)
class Update:
    """What an update did, as device tensors: reading them waits for the device."""

    grad_norm: Tensor
    skipped: Tensor
    """1.0 where loss or gradient were not finite and nothing was changed."""


def apply_update(optimizer: Optimizer, loss: Tensor, grad_clip: float) -> Update:
    """Clips to the global norm, skips where anything is not finite, updates, and frees the gradients.

    Args:
        loss: scalar; a loss that is not finite skips the update even if gradients are finite.
        grad_clip: largest global norm; 0 for no limit.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    skipped = (~(torch.isfinite(norm) & torch.isfinite(loss.to(norm.device)))).to(torch.float32)
    over = norm / grad_clip if grad_clip > 0 else torch.ones_like(norm)
    scale = torch.where(torch.isfinite(over), over.clamp(min=1.0), 1.0)
    optimizer.grad_scale = scale.to(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Update(norm, skipped)
