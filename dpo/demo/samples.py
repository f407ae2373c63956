"""What the demo's model writes before and after, and how much of it counts as positive.

The judge is not the model: a naive Bayes classifier of words, counted on the training sentences.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEMPERATURE = 0.6
MAX_TOKENS = 28


def generate(folder: Path, prompts: Sequence[str], *, per_prompt: int, seed: int) -> list[list[str]]:
    """Sample completions with plain Transformers from the checkpoint in `folder`: for each prompt, `per_prompt` texts.

    The same seed before every prompt, so that two checkpoints meet the same random numbers.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    texts = []
    for prompt in prompts:
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        written = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=MAX_TOKENS,
            num_return_sequences=per_prompt,
        )
        texts.append(tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True))
    return texts


class WordJudge:
    """Naive Bayes on which words occur, add-one smoothed, with equal priors."""

    def __init__(self, positive: Sequence[str], negative: Sequence[str]) -> None:
        counts = [Counter(word for text in texts for word in _words(text)) for texts in (positive, negative)]
        sizes = [len(positive) + 2, len(negative) + 2]
        self._log_odds = {
            word: math.log((counts[0][word] + 1) / sizes[0]) - math.log((counts[1][word] + 1) / sizes[1])
            for word in counts[0] | counts[1]
        }

    def is_positive(self, text: str) -> bool:
        """Whether the words of `text` speak for a positive sentence; unknown words say nothing."""
        return sum(self._log_odds.get(word, 0.0) for word in _words(text)) > 0

    def share_positive(self, texts: Iterable[str]) -> float:
        """The fraction of `texts` that is positive, from 0 to 1."""
        verdicts = [self.is_positive(text) for text in texts]
        return sum(verdicts) / len(verdicts)


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower()))
