"""One training step of TRL's DPOTrainer on given token ids.

The trainer is built as its users build it, except that the data arrives already tokenised: TRL tokenises text before
training, outside the step, so `_prepare_dataset` returns the token ids as they are. The loop around `training_step` is
the one of `transformers.Trainer` (collate, forward and backward, clip, optimizer, scheduler, zero_grad) without its
logging, progress bar and callbacks.
"""

import importlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import dpo_kernels
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

import dpo
from bench.workload import EOS, ModelShape, Pair, StepSettings

trl: Any = importlib.import_module("trl")  # an optional peer: type checkers need not find it

PATCHES: dict[str, Callable[[Any], Any]] = {
    "trl": lambda trainer: trainer,
    "trl-patched": dpo_kernels.patch_trl,
    "trl-shared": dpo.patch_trl,
}
"""TRL as it is, with our head and loss, and with our forward too."""
LAYOUTS = {"trl-shared": "one packed row, a prompt once for all of its completions"}
HEADS = {"trl": "every position (TRL's path without Triton)"}
OPTIMIZERS = {"rmsprop": "rmsprop", "adamw": "adamw_torch_fused"}


class _TokenIdTrainer(trl.DPOTrainer):
    """DPOTrainer over a dataset that already holds `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def _row(pair: Pair) -> dict[str, list[int]]:
    return {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}


def _tokenizer(shape: ModelShape) -> PreTrainedTokenizerFast:
    names = {f"t{i}": i for i in range(shape.vocabulary)}
    end = f"t{EOS}"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(names, unk_token="t0")), eos_token=end, pad_token=end
    )


def trainer_options(settings: StepSettings, max_steps: int) -> dict[str, Any]:
    """Every option given to DPOConfig; the rest is TRL's default, `loss_type` and the code path included.

    Gradient checkpointing, on by default in TRL, is off: it costs TRL time and no other side uses it.
    """
    return {
        "per_device_train_batch_size": settings.pairs_per_step,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_length": None,
        "beta": settings.beta,
        "precompute_ref_log_probs": False,
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant",
        "optim": OPTIMIZERS[settings.optimizer],
        "weight_decay": 0.0,
        "max_grad_norm": settings.grad_clip,
        "bf16": settings.dtype == "bf16",
        "use_cpu": True,
        "max_steps": max_steps,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def build_trainer(
    settings: StepSettings, steps: Sequence[Sequence[Pair]], *, name: str = "trl", **overrides: Any
) -> Any:
    """TRL's trainer on the pairs of `steps`, with an online reference of the policy's initial weights.

    name: of `PATCHES`.
    """
    transformers_logging.set_verbosity_error()
    options = trainer_options(settings, max(1, len(steps))) | overrides
    return PATCHES[name](_TokenIdTrainer)(
        model=settings.model.build(),
        ref_model=settings.model.build(),
        args=trl.DPOConfig(output_dir=tempfile.mkdtemp(prefix="bench-trl-"), **options),
        train_dataset=Dataset.from_list([_row(pair) for step in steps for pair in step]),
        processing_class=_tokenizer(settings.model),
    )


class TrlSide:
    """TRL 1.16 DPOTrainer; `step(pairs)` trains on the pairs and returns the loss."""

    def __init__(self, settings: StepSettings, steps: Sequence[Sequence[Pair]], name: str = "trl"):
        self.settings, self.name = settings, name
        self.trainer = build_trainer(settings, steps, name=name)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer_and_scheduler(10**6)
        self.model, self.optimizer = self.trainer.accelerator.prepare(self.trainer.model, self.trainer.optimizer)
        self.model.train()

    def step(self, pairs: Sequence[Pair]) -> float:
        trainer = self.trainer
        inputs = trainer.data_collator([_row(pair) for pair in pairs])
        loss = trainer.training_step(self.model, inputs)
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        self.optimizer.step()
        trainer.lr_scheduler.step()
        self.model.zero_grad()
        return loss.item()

    def configuration(self) -> dict[str, Any]:
        """How the step runs, for the record beside its times."""
        return {
            "trainer": "trl.DPOTrainer",
            "attention": self.trainer.model.config._attn_implementation,
            "layout": LAYOUTS.get(self.name, "chosen and rejected padded to the longest row of the batch"),
            "reference": "online",
            "lm_head": HEADS.get(self.name, "completion rows, dpo_kernels"),
            "optimizer": type(self.trainer.optimizer).__name__,
            "optimizer_defaults": {k: v for k, v in self.trainer.optimizer.defaults.items() if v is not None},
            "dpo_config": trainer_options(self.settings, 1),
        }
