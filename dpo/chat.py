"""Conversations: from messages to the text a chat template writes, prompt and completions apart.

The prompt is rendered as for generation (`add_generation_prompt=True`); a completion is what the template writes after
that prompt when the assistant's turn is there. A template for which this is not so (it writes the prompt differently
once an answer follows) is handled where only white space differs, and otherwise the row is refused: a policy must not
be trained in a context that it never sees.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo.errors import UserError

Message = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used. `reason` is counted; `detail` is shown for the first such row."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def is_messages(value: object) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(turn, Mapping) and "role" in turn for turn in value)
    )


class Chat:
    """A tokenizer's chat template. `options` are handed to it (`enable_thinking`, a date, ..)."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None):
        self._tokenizer = tokenizer
        self._options = dict(options or {})

    @property
    def has_template(self) -> bool:
        return bool(getattr(self._tokenizer, "chat_template", None))

    def require_template(self, label: str) -> None:
        if not self.has_template:
            raise UserError(
                f"{label}: expected a tokenizer with a chat template, as the rows are conversations; "
                f"found {type(self._tokenizer).__name__} without one"
            )

    def messages(self, value: Any, field: str) -> list[Message]:
        """Checked messages: a role and content each. A text is one assistant turn. Absent keys (null in Parquet) are
        left out."""
        if isinstance(value, str):
            return [{"role": "assistant", "content": value}]
        if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
            raise BadRow(f"field '{field}' is not a list of messages", f"found {type(value).__name__}")
        turns = [{key: item for key, item in turn.items() if item is not None} for turn in value]
        for turn in turns:
            if not isinstance(turn.get("role"), str):
                raise BadRow(
                    f"field '{field}' has a message without a role", f"found {', '.join(map(str, turn)) or 'nothing'}"
                )
            if not isinstance(turn.get("content"), str | list) and not turn.get("tool_calls"):
                raise BadRow(f"field '{field}' has a message without text content")
        return turns

    def split(
        self, prompt: list[Message], completions: list[list[Message]]
    ) -> tuple[list[Message], list[list[Message]]]:
        """The turns that all completions share, and each completion's own turns, which must all be the assistant's.

        A completion may be its own turns only, or the whole conversation with the prompt's turns in front.
        """
        whole = [turns if turns[: len(prompt)] == prompt else prompt + turns for turns in completions]
        shortest = min(map(len, whole))
        if shortest <= len(prompt):
            raise BadRow("empty completion")
        shared = next((i for i in range(shortest) if any(turns[i] != whole[0][i] for turns in whole)), shortest)
        shared = min(shared, shortest - 1)
        if shared == 0:
            raise BadRow("conversation without a shared prompt turn")
        replies = [turns[shared:] for turns in whole]
        for turn in (turn for reply in replies for turn in reply):
            if turn["role"] != "assistant":
                raise BadRow("completion with a turn that is not the assistant's", f"found role {turn['role']}")
        return whole[0][:shared], replies

    def render(self, prompt: list[Message], replies: list[list[Message]]) -> tuple[str, list[str]]:
        """The prompt's text and each reply's text after it; "" for a reply without content."""
        start = self._apply(prompt, generate=True)
        return start, [self._continuation(start, prompt, reply) if _has_content(reply) else "" for reply in replies]

    def _continuation(self, start: str, prompt: list[Message], reply: list[Message]) -> str:
        whole = self._apply(prompt + reply, generate=False)
        if whole.startswith(start):
            return whole[len(start) :]
        shared = next(
            (i for i, (a, b) in enumerate(zip(start, whole, strict=False)) if a != b), min(len(start), len(whole))
        )
        if start[shared:].strip():
            detail = f"before an answer the template writes {start[shared:][:40]!r}, with one {whole[shared:][:40]!r}"
            raise BadRow("chat template that is not prefix-preserving", detail)
        return whole[shared:].lstrip()

    def _apply(self, messages: list[Message], *, generate: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generate, **self._options
            )
        except Exception as error:  # whatever the template's own code raises
            raise BadRow(
                "chat template refuses the messages", f"{type(error).__name__}: {str(error).strip()[:120]}"
            ) from error


def _has_content(reply: list[Message]) -> bool:
    return any(turn.get("tool_calls") or _text_of(turn.get("content", "")).strip() for turn in reply)


def _text_of(content: str | list[Any]) -> str:
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) if isinstance(part, Mapping) else str(part) for part in content)
