"""Samples at every evaluation: samples.jsonl, and the numbers that go into the evaluation's record."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from dpo.inputs import Policy
from dpo.loss import Objective
from dpo.metrics import JsonLines
from dpo.samples import Ids, SamplePlan, estimate_kl, generate, sample_logps

ReferenceModel = Callable[[int], AbstractContextManager[Any]]
"""Given the updates so far, lends the reference as a model for the time of a `with` block."""


SHOWN = 8


def _shown(record: dict[str, Any]) -> str:
    return f"**{record['prompt']}**\n\npolicy: {record['policy'][0]}\n\nreference: {record['reference'][0]}"


class Sampler:
    """Writes with policy and reference, and compares them."""

    def __init__(
        self,
        run: Path,
        plan: SamplePlan,
        policy: Policy,
        reference: ReferenceModel,
        objective: Objective,
        *,
        start: int,
    ) -> None:
        self.plan, self.policy, self.reference, self.objective = plan, policy, reference, objective
        self.file = JsonLines(run / "samples.jsonl", before_step=start + 1)
        self._reference_samples: list[list[Ids]] | None = None

    def __call__(self, done: int) -> tuple[dict[str, Any], str]:
        """Samples after `done` updates; returns `kl`, `kl_se` (None without sampling) and `sample_tokens`, and the
        samples of the first prompts as Markdown."""
        plan, model = self.plan, self.policy.model
        samples = generate(model, plan, self.objective)
        # before the reference is lent: it may be this very model, with its adapter off
        ours = sample_logps(model, plan, samples, self.objective) if plan.temperature > 0 else []
        theirs: list[float] = []
        with self.reference(done) as reference:
            if self._reference_samples is None:
                self._reference_samples = generate(reference, plan, self.objective)
            if ours:
                theirs = sample_logps(reference, plan, samples, self.objective)
        log_ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
        records = [
            {
                "step": done,
                "prompt": prompt,
                "policy": self._texts(samples[k]),
                "reference": self._texts(self._reference_samples[k]),
                "log_ratio": log_ratios[k * plan.per_prompt : (k + 1) * plan.per_prompt],
            }
            for k, prompt in enumerate(plan.texts)
        ]
        for record in records:
            self.file.write(record)
        lengths = [len(ids) for group in samples for ids in group]
        kl = estimate_kl(log_ratios, plan.per_prompt) if log_ratios else None
        found = {
            "kl": kl and kl.mean,
            "kl_se": kl and kl.standard_error,
            "sample_tokens": sum(lengths) / len(lengths),
        }
        return found, "\n\n".join(map(_shown, records[:SHOWN]))

    def _texts(self, samples: list[Ids]) -> list[str]:
        return self.policy.tokenizer.batch_decode(samples, skip_special_tokens=True)

    def close(self) -> None:
        self.file.close()
