"""The update: clipping and the non-finite check folded into one fused optimizer pass, without a host sync."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from dpo.errors import UserError
from dpo.precision import LossScale, Weights


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


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "rmsprop": RMSprop,
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "adafactor": torch.optim.Adafactor,
    "sgd": torch.optim.SGD,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
}
"""The optimizers of `--optimizer`: ours and torch's, but for those that need a closure or sparse gradients."""
_FUSED_WHOLE_ONLY = {"sgd", "adagrad"}
"""torch has fused kernels of these, but not for tensors that ranks hold parts of."""
_OURS = {"params", "lr", "weight_decay", "foreach", "fused", "capturable", "differentiable", "maximize"}


def build_optimizer(
    name: str,
    params: Iterable[Tensor],
    *,
    lr: float,
    weight_decay: float = 0.0,
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The optimizer of `--optimizer`, fused into one pass where torch has that.

    Args:
        options: further arguments of it, such as betas or momentum.
    Raises:
        UserError: it has no such option, or refuses the value.
    """
    kind = OPTIMIZERS[name]
    known = inspect.signature(kind.__init__).parameters
    for option in options or {}:
        if option not in known or option in _OURS | {"self"}:
            free = ", ".join(sorted(known.keys() - _OURS - {"self"}))
            raise UserError(f"--optimizer-options: expected options of {name} ({free}), found {option!r}")
    if weight_decay and "weight_decay" not in known:
        raise UserError(f"--weight-decay: expected an optimizer that has it, found {name}")
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
    if "weight_decay" in known:
        arguments["weight_decay"] = weight_decay
    params = list(params)
    sharded = any(isinstance(p, DTensor) for p in params)
    if "fused" in known and not (sharded and name in _FUSED_WHOLE_ONLY):
        arguments["fused"] = True
    try:
        return kind(params, lr=lr, **arguments)  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer-options: {name}: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step: a linear rise, then a shape.

    paper, constant: stays (Appendix B; constant is meant without a rise). linear, cosine: falls, to `end` times the
    peak, reached after the last step.
    """

    kind: str
    lr: float
    warmup_steps: int
    total: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / (self.warmup_steps + 1)
        if self.kind in ("paper", "constant"):
            return self.lr
        done = (step - self.warmup_steps) / max(self.total - self.warmup_steps, 1)
        left = 1.0 - done if self.kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.lr * (self.end + (1.0 - self.end) * left)


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
    overflow: Tensor
    """1.0 where that came from the scale of an fp16 loss, which was lowered: no fault of data or model."""
    loss_scale: Tensor | None = None


def apply_update(
    optimizer: Optimizer,
    loss: Tensor,
    grad_clip: float,
    *,
    weights: Weights | None = None,
    loss_scale: LossScale | None = None,
) -> Update:
    """Clips to the global norm, skips where anything is not finite, updates, and frees the gradients.

    Args:
        loss: scalar, not scaled; a loss that is not finite skips the update even if gradients are finite.
        grad_clip: largest global norm; 0 for no limit.
        weights: what stands between parameters and optimizer. None: nothing, the optimizer holds the parameters.
        loss_scale: what the loss was multiplied by before its backward.
    """
    if weights is None:
        weights = Weights([p for group in optimizer.param_groups for p in group["params"]])
    grads = weights.grads()
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    scale = torch.ones_like(norm) if loss_scale is None else loss_scale.scale.to(norm.dtype, copy=True)
    norm = norm / scale
    good_loss = torch.isfinite(loss.to(norm.device))
    skipped = (~(torch.isfinite(norm) & good_loss)).to(torch.float32)
    over = norm / grad_clip if grad_clip > 0 else torch.ones_like(norm)
    divisor = scale * torch.where(torch.isfinite(over), over.clamp(min=1.0), 1.0)
    for _ in weights.chunks():
        _step(optimizer, divisor.to(torch.float32), skipped)
    if loss_scale is None:
        return Update(norm, skipped, torch.zeros_like(skipped))
    # at a scale of 1 there is nothing left to lower: then it is the model that overflows
    overflow = skipped * good_loss * (scale > 1.0)
    loss_scale.update(overflow)
    return Update(norm, skipped, overflow, scale)


def _step(optimizer: Optimizer, divisor: Tensor, skipped: Tensor) -> None:
    """One step with all gradients divided by `divisor`, or none where `skipped` is 1.0."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale = divisor  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return
    if skipped.item():  # host sync: these optimizers cannot be told on the device
        return
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for grad in grads:
        grad /= divisor
    optimizer.step()
