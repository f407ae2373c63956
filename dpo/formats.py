"""Preference formats: how a row becomes one prompt, its completions and their comparisons, as text.

The format is a property of the whole source: it is recognised from the columns and the first rows, and printed. A row
that does not fit is a `BadRow` with a reason that can be counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from dpo.chat import BadRow, Chat, Message, is_messages
from dpo.comparisons import Comparisons, candidates
from dpo.errors import UserError

Row = Mapping[str, Any]

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"

ACCEPTED = (
    "prompt, chosen, rejected; chosen, rejected; prompt, completions, scores (or ranks); "
    "history, human_ref_A, human_ref_B, labels (text, or lists of role/content messages)"
)


@dataclass(slots=True)
class Record:
    """One row as text. `templated`: a chat template wrote the prompt, which then brings its own special tokens.
    `joint`: the completions still begin with the prompt they share (`prompt` is empty), which is cut off where the
    tokens are known. `scores`: one a completion, higher is better, where the data has them; `ties`, `close`:
    comparisons left out for equal scores, and for scores too close."""

    row: int
    prompt: str
    completions: list[str]
    pairs: list[tuple[int, int]]
    templated: bool = False
    joint: bool = False
    scores: list[float] | None = None
    ties: int = 0
    close: int = 0


@dataclass(frozen=True)
class Format:
    """A recognised format. `convert` turns one row into a Record or raises BadRow. `scored`: its rows compare several
    completions by scores or ranks."""

    name: str
    convert: Callable[[int, Row], Record]
    conversational: bool = False
    scored: bool = False


def recognise(
    rows: Sequence[Row],
    *,
    label: str,
    chat: Chat,
    comparisons: Comparisons = Comparisons(),  # noqa: B008
) -> Format:
    """The format of a source, from its first rows. Raises UserError that names the columns found when there is none
    that fits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    has = set(columns).issuperset
    prompt = ("prompt",) if has({"prompt"}) else ()
    ranking = "scores" if has({"scores"}) else "ranks"
    if has({"completions", ranking}):
        used = (*prompt, "completions")
        name = f"K completions with {ranking} ({', '.join((*used, ranking))})"
        if _conversational(rows, used):
            chat.require_template(label)
            convert = partial(_scored, ranking=ranking, comparisons=comparisons, chat=chat, has_prompt=bool(prompt))
            return Format(f"conversational, {name}", convert, conversational=True, scored=True)
        if prompt:
            return Format(name, partial(_scored, ranking=ranking, comparisons=comparisons), scored=True)
    elif has({"history", "human_ref_A", "human_ref_B", "labels"}):
        return Format("SHP (history, human_ref_A, human_ref_B, labels)", _shp)
    elif has({"chosen", "rejected"}):
        used = (*prompt, "chosen", "rejected")
        name = f"{'explicit' if prompt else 'implicit'} prompt ({', '.join(used)})"
        if _conversational(rows, used):
            chat.require_template(label)
            return Format(f"conversational, {name}", partial(_messages, chat=chat, has_prompt=bool(prompt)), True)
        if prompt:
            return Format(name, _explicit)
        return Format("Anthropic HH transcripts (chosen, rejected)", _hh) if _is_hh(rows) else Format(name, _implicit)
    raise UserError(f"{label}: expected the columns {ACCEPTED}; found {', '.join(map(str, columns)) or 'no columns'}")


def _conversational(rows: Sequence[Row], fields: Sequence[str]) -> bool:
    """Whether any field of the first rows holds messages: one such row settles it, and rows of another kind are then
    counted as bad."""

    def holds(value: object) -> bool:
        return is_messages(value) or (isinstance(value, list) and any(is_messages(item) for item in value))

    return any(holds(row.get(field)) for row in rows for field in fields)


def _is_hh(rows: Sequence[Row]) -> bool:
    texts = [row["chosen"] for row in rows if isinstance(row.get("chosen"), str)]
    matching = sum(HH_ASSISTANT in text and text.lstrip().startswith(HH_HUMAN.strip()) for text in texts)
    return 2 * matching > len(texts)


# --- Plain text -------------------------------------------------------------------------------------------------------


def _explicit(row: int, fields: Row) -> Record:
    prompt, chosen, rejected = (_text(fields, field) for field in ("prompt", "chosen", "rejected"))
    return Record(row, prompt, [chosen, rejected], [(0, 1)])


def _implicit(row: int, fields: Row) -> Record:
    return Record(row, "", [_text(fields, "chosen"), _text(fields, "rejected")], [(0, 1)], joint=True)


def _hh(row: int, fields: Row) -> Record:
    """Transcripts share everything up to the last assistant turn: the prompt ends with "\\n\\nAssistant:", a completion
    begins after it."""
    chosen, rejected = _text(fields, "chosen"), _text(fields, "rejected")
    marker = common_prefix(chosen, rejected).rfind(HH_ASSISTANT)
    if marker < 0:
        raise BadRow("transcripts without a shared assistant turn")
    cut = marker + len(HH_ASSISTANT)
    completions = [chosen[cut:], rejected[cut:]]
    if any(HH_HUMAN in text or HH_ASSISTANT in text for text in completions):
        raise BadRow("transcripts that part before the last assistant turn")
    return Record(row, chosen[:cut], completions, [(0, 1)])


def _shp(row: int, fields: Row) -> Record:
    """Dialogue form of the DPO authors' code: "\\n\\nHuman: {history}\\n\\nAssistant:", completions with a space in
    front. labels 1: A is preferred."""
    history, a, b = (_text(fields, field) for field in ("history", "human_ref_A", "human_ref_B"))
    label = _required(fields, "labels")
    if isinstance(label, bool) or str(label) not in ("0", "1"):
        raise BadRow("field 'labels' is neither 0 nor 1", f"found {label!r}")
    pair = (0, 1) if int(label) == 1 else (1, 0)
    return Record(row, f"{HH_HUMAN} {history}{HH_ASSISTANT}", [f" {a}", f" {b}"], [pair])


def common_prefix(a: str, b: str) -> str:
    """The longest common prefix of two texts, found by halving."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return a[:low]


# --- Messages ---------------------------------------------------------------------------------------------------------


def _messages(row: int, fields: Row, *, chat: Chat, has_prompt: bool) -> Record:
    completions = [chat.messages(_required(fields, name), name) for name in ("chosen", "rejected")]
    return _rendered(row, _required(fields, "prompt") if has_prompt else [], completions, [(0, 1)], chat)


def _rendered(
    row: int, prompt: Any, completions: list[list[Message]], pairs: list[tuple[int, int]], chat: Chat
) -> Record:
    if isinstance(prompt, str):
        # UltraFeedback's prompt repeats what the conversations already begin with.
        whole = all(turns and turns[0]["role"] != "assistant" for turns in completions)
        prompt = [] if whole else [{"role": "user", "content": prompt}]
    turns, replies = chat.split(chat.messages(prompt, "prompt"), completions)
    text, texts = chat.render(turns, replies)
    return Record(row, text, texts, pairs, templated=True)


# --- K completions ----------------------------------------------------------------------------------------------------


def _scored(
    row: int,
    fields: Row,
    *,
    ranking: str,
    comparisons: Comparisons,
    chat: Chat | None = None,
    has_prompt: bool = True,
) -> Record:
    """All pairs of completions whose scores differ enough (higher is better; for ranks, lower is).

    A completion that is empty, and a pair of equal texts, leaves the others of its row alone."""
    completions, values = _required(fields, "completions"), _numbers(fields, ranking)
    if not isinstance(completions, list):
        raise BadRow("field 'completions' is not a list")
    if len(completions) != len(values):
        raise BadRow(f"as many completions as {ranking} expected", f"found {len(completions)} and {len(values)}")
    if len(completions) < 2:
        raise BadRow("fewer than two completions")
    better = [-value for value in values] if ranking == "ranks" else values
    found = candidates(better, comparisons)
    if chat is None:
        if any(not isinstance(text, str) for text in completions):
            raise BadRow("field 'completions' holds something that is not text")
        record = Record(row, _text(fields, "prompt"), list(completions), found.pairs)
    else:
        prompt = _required(fields, "prompt") if has_prompt else []
        turns = [chat.messages(item, "completions") for item in completions]
        record = _rendered(row, prompt, turns, found.pairs, chat)
    record.scores, record.ties, record.close = better, found.ties, found.close
    return record


def prune(record: Record, same: Sequence[Any], *, after: str = "") -> dict[str, int]:
    """Drop a record's pairs that have an empty completion or two equal ones. Returns how many, by reason.

    `same`: what equality is judged by, one item a completion (texts or token ids), falsy where the completion is empty.
    Raises BadRow when no pair is left."""
    kept: list[tuple[int, int]] = []
    dropped: dict[str, int] = {}
    for chosen, rejected in record.pairs:
        if not same[chosen] or not same[rejected]:
            reason = f"empty completion{after}"
        elif same[chosen] == same[rejected]:
            reason = f"identical chosen and rejected{after}"
        else:
            kept.append((chosen, rejected))
            continue
        dropped[reason] = dropped.get(reason, 0) + 1
    if not kept:
        raise BadRow(max(dropped, key=lambda reason: dropped[reason]))
    record.pairs = kept
    return dropped


# --- Fields -----------------------------------------------------------------------------------------------------------


def _required(fields: Row, field: str) -> Any:
    value = fields.get(field)
    if value is None:
        raise BadRow(f"field '{field}' missing")
    return value


def _text(fields: Row, field: str) -> str:
    value = _required(fields, field)
    if not isinstance(value, str):
        raise BadRow(f"field '{field}' is not text", f"found {type(value).__name__}")
    return value


def _numbers(fields: Row, field: str) -> list[float]:
    values = _required(fields, field)
    if not isinstance(values, list):
        raise BadRow(f"field '{field}' is not a list")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int | float) or not -math.inf < value < math.inf:
            raise BadRow(f"field '{field}' holds something that is not a finite number", f"found {value!r}")
    return values
