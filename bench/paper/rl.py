"""The on-policy baseline: RLOO of TRL, which is given the ground-truth reward. TRL has no PPO any more.

It maximises the reward less beta times the sequence's log ratio, the paper's eq. 3, from fresh samples at every step:
as many of them in all as there are in the preferences of the other methods. Needs the extra `peers`.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from bench.paper.sampling import Reward
from bench.paper.settings import Settings


def train_rloo(
    base: Path,
    folder: Path,
    tokenizer: Any,
    reward: Reward,
    prompts: Tensor,
    beta: float,
    settings: Settings,
    seed: int,
) -> tuple[int, Any]:
    """Steps done and the trained policy.

    base: the reference's folder. folder: scratch. prompts: [X, P] token ids, a step takes `prompts_per_step` of them.

    Raises ImportError where TRL is not installed.
    """
    from datasets import Dataset
    from trl.trainer.rloo_config import RLOOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.rloo_trainer import RLOOTrainer  # pyright: ignore[reportMissingImports]

    def score(prompts: list[str], completions: list[str], **_: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        return [reward((prompt + text).replace(tokenizer.eos_token, "")) for prompt, text in pairs]

    config = RLOOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings.prompts_per_step * settings.completions,
        num_generations=settings.completions,
        max_completion_length=settings.max_new_tokens,
        max_steps=len(prompts) // settings.prompts_per_step,
        learning_rate=settings.rl_lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        max_grad_norm=settings.grad_clip,
        optim="rmsprop",
        beta=beta,
        temperature=1.0,
        top_k=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1000,
        disable_tqdm=True,
        seed=seed,
        model_init_kwargs={"dtype": "float32"},
    )
    warnings.simplefilter("ignore", FutureWarning)  # of names that TRL has not followed yet
    texts = tokenizer.batch_decode(prompts)
    trainer = RLOOTrainer(
        model=str(base),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": texts}),
        processing_class=tokenizer,
    )
    trainer.train()
    shutil.rmtree(folder, ignore_errors=True)
    return trainer.state.global_step, trainer.model
