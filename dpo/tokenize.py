"""Text to token ids, so that training sees the very tokens that generation sees.

- A prompt is tokenised as for generation: plain text with the special tokens that the tokenizer puts in front (BOS
  where that is its convention; never two, and never an end-of-sequence behind), a templated prompt with those that the
  template wrote.
- A completion is tokenised on its own, without special tokens and without the space that a tokenizer may put before the
  first word of a text. So a completion never changes the prompt's tokens, and the tokens decode to prompt + completion.
- A completion ends at its first end-of-sequence token, any of the model's; what a template writes after it (a newline)
  goes. Where it has none, one is added. Exactly one end-of-sequence, at the end, and it is a target.
- Truncation: prompts lose tokens from the left and keep BOS, completions from the right. A truncated completion gets no
  end-of-sequence: the model must not learn to stop in mid-sentence. The limits count BOS and end-of-sequence.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from dpo.errors import UserError
from dpo.formats import common_prefix

Ids = list[int]

_ANCHORS = ("\n", "\u2063", "a\n")


@dataclass(frozen=True)
class Limits:
    """Most tokens of a prompt, of a completion (end-of-sequence included), and of both together. None: no limit."""

    prompt: int | None = None
    completion: int | None = None
    total: int | None = None


class Codec:
    """One tokenizer with the rules above. eos_token_ids: every id that ends a generation, at least one."""

    def __init__(self, tokenizer: Any, eos_token_ids: Sequence[int]):
        if not eos_token_ids:
            raise UserError("tokenizer: expected at least one end-of-sequence token id; found none")
        self._tokenizer = tokenizer
        self.eos_token_ids = frozenset(int(token) for token in eos_token_ids)
        own = tokenizer.eos_token_id
        self.eos_token_id = int(own if own in self.eos_token_ids else eos_token_ids[0])
        self.bos_token_id: int | None = tokenizer.bos_token_id
        self._blank: dict[tuple[int, ...], bool] = {(): True}
        self.start = self._start_tokens()
        self._plain = _plain_backend(tokenizer)
        self._anchor = None if self._plain else self._find_anchor()

    # --- Prompts

    def prompts(self, texts: Sequence[str], *, templated: bool) -> list[Ids]:
        """Token ids as generation gets them. Empty only for an empty text of a tokenizer without BOS."""
        encoded = self._encode(texts)
        return encoded if templated else [self._started(ids) for ids in encoded]

    def _started(self, ids: Ids) -> Ids:
        return ids if self.start and ids[: len(self.start)] == self.start else self.start + ids

    def _start_tokens(self) -> Ids:
        """The special tokens that the tokenizer puts before a text, found by tokenising one with and without them."""
        bare = self._encode(["a"])[0]
        full = self._encode(["a"], special=True)[0]
        places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
        return full[: places[0]] if places else []

    def cut_prompt(self, ids: Ids, limit: int | None) -> Ids:
        """The last `limit` tokens; a BOS in front stays, in place of one of them, where there is room for more than
        it."""
        if limit is None or len(ids) <= limit:
            return ids
        keep = self._fixed_start(ids) if limit > len(self.start) else 0
        return ids[:keep] + ids[len(ids) - (limit - keep) :]

    def _fixed_start(self, ids: Ids) -> int:
        if self.start and ids[: len(self.start)] == self.start:
            return len(self.start)
        return int(bool(ids) and self.bos_token_id is not None and ids[0] == self.bos_token_id)

    # --- Completions

    def completions(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of text that continues a prompt: no special tokens added, no space put in front. End-of-sequence
        not settled yet."""
        if self._plain is not None:
            return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]
        if self._anchor is None:
            return self._encode(texts)
        text, ids = self._anchor
        encoded = self._encode([text + completion for completion in texts])
        # An anchor that merged with the completion gives no clean cut: then a space in front is the lesser evil.
        return [
            full[len(ids) :] if full[: len(ids)] == ids else self._encode([completion])[0]
            for full, completion in zip(encoded, texts, strict=True)
        ]

    def close(self, ids: Ids) -> tuple[Ids, bool]:
        """The completion up to its first end-of-sequence, or with one added; and whether text was lost behind it.

        Empty when there is no token but end-of-sequence.
        """
        end = next((i for i, token in enumerate(ids) if token in self.eos_token_ids), None)
        if end is None:
            return ([*ids, self.eos_token_id] if ids else []), False
        rest = tuple(token for token in ids[end + 1 :] if token not in self.eos_token_ids)
        if rest not in self._blank:
            self._blank[rest] = not self._tokenizer.decode(list(rest)).strip()
        return (ids[: end + 1] if end else []), not self._blank[rest]

    # --- Text that still holds prompt and completion

    def cut_points(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Where to cut the prompt off two texts that begin alike: the last token boundary of both within their common
        prefix that does not split a word or take the space off one (else the last token boundary), leaving something
        of both. A slow tokenizer's token boundaries are not known: there, any such place between words."""
        limits = [min(len(common_prefix(a, b)), len(a) - 1, len(b) - 1) for a, b in pairs]
        if self._plain is None:
            return [_last_cut(a, b, range(limit + 1), limit) for (a, b), limit in zip(pairs, limits, strict=True)]
        encodings = self._plain.encode_batch([text for pair in pairs for text in pair], add_special_tokens=False)
        cuts = []
        for i, ((a, b), limit) in enumerate(zip(pairs, limits, strict=True)):
            places = _boundaries(encodings[2 * i].offsets, limit)
            places = places[np.isin(places, _boundaries(encodings[2 * i + 1].offsets, limit))]
            cuts.append(_last_cut(a, b, places.tolist(), limit))
        return cuts

    # --- The tokenizer

    def _encode(self, texts: Sequence[str], *, special: bool = False) -> list[Ids]:
        return self._tokenizer(
            list(texts),
            add_special_tokens=special,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _find_anchor(self) -> tuple[str, Ids] | None:
        """For a tokenizer without a `tokenizers` backend that puts a space before a text: some text to put in front and
        take away again."""
        bare = self._encode(["a"])[0]
        for text in _ANCHORS:
            ids = self._encode([text])[0]
            full = self._encode([text + "a"])[0]
            if ids and full[: len(ids)] == ids:
                return (text, ids) if full[len(ids) :] != bare else None
        return None


def _last_cut(a: str, b: str, places: Sequence[int], limit: int) -> int:
    usable = [place for place in places if 0 <= place <= limit]
    for place in reversed(usable):
        if not _splits_word(a, place) and not _splits_word(b, place):
            return place
    return usable[-1] if usable else 0


def _splits_word(text: str, place: int) -> bool:
    """Whether a cut at `place` would part a word, or a word and the space in front of it."""
    return 0 < place < len(text) and (text[place - 1] == " " or (text[place - 1].isalnum() and text[place].isalnum()))


def _boundaries(offsets: Sequence[tuple[int, int]], limit: int) -> np.ndarray:
    """Character positions up to `limit` at which a token starts and none is under way (bytes of one character share its
    offsets)."""
    spans = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    before = np.maximum.accumulate(np.concatenate([[0], spans[:-1, 1]])) if len(spans) else np.zeros(0, np.int64)
    return spans[(before <= spans[:, 0]) & (spans[:, 0] <= limit), 0]


def _plain_backend(tokenizer: Any) -> Tokenizer | None:
    """A copy of a fast tokenizer's backend that puts nothing before a text: neither special tokens nor a space. None
    for a slow tokenizer.

    The space comes from a Metaspace or ByteLevel pre-tokenizer or from a Prepend normalizer. The post-processor goes
    too, as it may trim the spaces off the offsets that `cut_points` reads.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    config = json.loads(backend.to_str())
    config.update(post_processor=None, truncation=None, padding=None)
    config["normalizer"] = _without_prefix(config["normalizer"])
    config["pre_tokenizer"] = _without_prefix(config["pre_tokenizer"])
    copy = Tokenizer.from_str(json.dumps(config))
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _without_prefix(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    changed = dict(step)
    for key in ("normalizers", "pretokenizers"):
        if key in step:
            changed[key] = [inner for inner in map(_without_prefix, step[key]) if inner is not None]
    if step["type"] == "Metaspace":
        changed["prepend_scheme"] = "never"
    if step["type"] == "ByteLevel":
        changed["add_prefix_space"] = False
    return changed
