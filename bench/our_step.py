"""One training step of this project's trainer on given token ids: the stages of `dpo.train`'s loop, in its order.

What `dpo train` does beside a step is left out, as it is on TRL's side: logging, the progress line, evaluation, saving.
"""

from collections.abc import Sequence
from typing import Any

from bench.workload import Pair, StepSettings
from dpo.config import TrainConfig
from dpo.cpu import keep_freed_memory
from dpo.engine import forward_backward
from dpo.inputs import objective_of, plan_of
from dpo.model import prepare
from dpo.optim import apply_update, build_optimizer, set_lr
from dpo.packing import Group, Layout
from dpo.reference import OnlineReference, freeze
from dpo.steps import build_step


class PairList(list[Group]):
    """Groups of one pair each, as the data of a run."""

    def num_pairs(self, index: int, /) -> int:
        return len(self[index].pairs)


def shared_groups(pairs: Sequence[Pair]) -> PairList:
    """The pairs by prompt, a prompt and a completion once each, as `dpo train` merges the rows of a flat file."""
    found: dict[tuple[int, ...], tuple[dict[tuple[int, ...], int], list[tuple[int, int]]]] = {}
    for pair in pairs:
        place, held = found.setdefault(tuple(pair.prompt), ({}, []))
        sides = [place.setdefault(tuple(y), len(place)) for y in (pair.chosen, pair.rejected)]
        held.append((sides[0], sides[1]))
    return PairList(Group(prompt, list(place), held, row) for row, (prompt, (place, held)) in enumerate(found.items()))


def train_config(settings: StepSettings, layout: Layout) -> TrainConfig:
    """The flags of `dpo train` for this step; everything not named is the default."""
    return TrainConfig(
        model="",
        data="",
        max_prompt_length=None,
        max_completion_length=None,
        beta=settings.beta,
        padded=layout == "padded",
        share_prefix=layout == "shared",
        dtype="bf16" if settings.dtype == "bf16" else "fp32",
        device="cpu",
        reference="online",
        pairs_per_step=settings.pairs_per_step,
        optimizer="adamw" if settings.optimizer == "adamw" else "rmsprop",
        lr=settings.lr,
        grad_clip=settings.grad_clip,
    )


class OurSide:
    """`dpo train` with the prompt shared, or `--padded`; `step(pairs)` trains on the pairs and returns the loss."""

    def __init__(self, settings: StepSettings, steps: Sequence[Sequence[Pair]], layout: Layout):
        self.name = layout
        self.config = train_config(settings, layout)
        self.objective, self.plan = objective_of(self.config), plan_of(self.config)
        keep_freed_memory()
        self.model, reference = settings.model.build(), settings.model.build()
        for model in (self.model, reference):
            prepare(model, layout)
        freeze(reference, self.objective)
        reference.eval()
        self.model.train()
        self.reference = OnlineReference(reference, self.objective)
        self.optimizer = build_optimizer(self.config.optimizer, list(self.model.parameters()), lr=self.config.lr)

    def step(self, pairs: Sequence[Pair]) -> float:
        if self.name == "shared":
            groups = shared_groups(pairs)
        else:
            groups = PairList(Group(p.prompt, [p.chosen, p.rejected], [(0, 1)], row) for row, p in enumerate(pairs))
        step = build_step(groups, range(len(groups)), self.plan)
        set_lr(self.optimizer, self.config.lr)
        result = forward_backward(self.model, step, self.reference, self.objective)
        apply_update(self.optimizer, result.sums.loss, self.config.grad_clip)
        return result.sums.read()["loss"]

    def configuration(self) -> dict[str, Any]:
        """How the step runs, for the record beside its times."""
        default = TrainConfig(model="", data="")
        changed = {k: v for k, v in vars(self.config).items() if v != getattr(default, k)}
        return {
            "trainer": "dpo train" + (" --padded" if self.config.padded else ""),
            "attention": self.model.config._attn_implementation,
            "layout": "rows padded to the longest" if self.config.padded else "packed, prompt shared",
            "reference": "online",
            "lm_head": f"completion rows only, fused, plan {self.config.head_plan}",
            "optimizer": type(self.optimizer).__name__,
            "optimizer_defaults": {k: v for k, v in self.optimizer.defaults.items() if v is not None},
            "flags": changed,
        }
