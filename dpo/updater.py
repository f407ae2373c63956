"""From settings to an update: the optimizer with its schedule, and what its precision needs around it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dpo.config import TrainConfig
from dpo.errors import UserError
from dpo.optim import Schedule, Update, apply_update, build_optimizer, set_lr
from dpo.precision import Average, LossScale, MasterWeights, RoundedWeights, Weights


class Updater:
    """Everything that changes the weights, and what of it a checkpoint must hold."""

    def __init__(self, config: TrainConfig, model: Any, total_steps: int) -> None:
        params = [p for p in model.parameters() if p.requires_grad]
        self.grad_clip = config.grad_clip
        self.schedule = Schedule(config.schedule, config.lr, config.warmup, total_steps, config.lr_end or 0.0)
        if all(p.dtype == torch.float32 for p in params):  # adapters are, on bf16 weights too
            if config.bf16_update is not None:
                raise UserError("--bf16-update: expected parameters in bf16 that train, found fp32")
            self.weights = Weights(params)
        elif config.bf16_update == "random":
            self.weights = RoundedWeights(params, config.seed)
        else:
            self.weights = MasterWeights(params)
        self.optimizer = build_optimizer(
            config.optimizer,
            self.weights.targets,
            lr=config.lr,
            weight_decay=config.weight_decay,
            options=config.parsed_optimizer_options(),
        )
        self.average = Average(params, self.weights, config.ema) if config.ema is not None else None
        self.scale = LossScale(params[0].device) if config.dtype == "fp16" else None

    @property
    def loss_scale(self) -> Tensor | float:
        """What the loss of the next backward is to be multiplied by."""
        return 1.0 if self.scale is None else self.scale.scale

    def __call__(self, step: int, loss: Tensor) -> tuple[Update, float]:
        """The update of step 0, 1, ... from the gradients that are there; returns it and its learning rate."""
        lr = self.schedule(step)
        set_lr(self.optimizer, lr)
        update = apply_update(self.optimizer, loss, self.grad_clip, weights=self.weights, loss_scale=self.scale)
        if self.average is not None:
            self.average.update()
        return update, lr

    def averaged(self) -> AbstractContextManager[None]:
        """The model has the averaged weights inside the block, where --ema asks for them."""
        return nullcontext() if self.average is None else self.average.applied()

    @property
    def parts(self) -> dict[str, Any]:
        """What goes into a checkpoint, by name."""
        found = {"optimizer": self.optimizer, "weights": self.weights, "average": self.average, "scale": self.scale}
        return {name: part for name, part in found.items() if part is not None}
