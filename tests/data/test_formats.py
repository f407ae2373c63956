"""Every format by example: what is recognised, which text becomes the prompt, the completions and the pairs."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo.chat import BadRow, Chat
from dpo.data import PreferenceData, load_preferences
from dpo.errors import UserError
from dpo.formats import common_prefix, prune, recognise
from tests.data import tiny
from tests.data.tiny import assistant, user


def load(rows: list[dict[str, Any]], tokenizer: Any = None, **options: Any) -> PreferenceData:
    tokenizer = tokenizer or tiny.chatml()
    return load_preferences(rows, tokenizer, eos_token_ids=tiny.eos_of(tokenizer), **options)


HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: good?\n\nAssistant:"

CASES = [
    pytest.param(
        {"prompt": "Q:", "chosen": " yes", "rejected": " no"},
        "explicit prompt (prompt, chosen, rejected)",
        ("Q:", [" yes", " no"], [(0, 1)]),
        id="explicit",
    ),
    pytest.param(
        {"chosen": "It was a good day", "rejected": "It was a bad day"},
        "implicit prompt (chosen, rejected)",
        ("It was a", [" good day", " bad day"], [(0, 1)]),
        id="implicit",
    ),
    pytest.param(
        {"chosen": HH + " Yes.", "rejected": HH + " No.\n"},
        "Anthropic HH transcripts (chosen, rejected)",
        (HH, [" Yes.", " No.\n"], [(0, 1)]),
        id="hh",
    ),
    pytest.param(
        {"history": "why?", "human_ref_A": "a", "human_ref_B": "b", "labels": 0, "score_A": 1},
        "SHP (history, human_ref_A, human_ref_B, labels)",
        ("\n\nHuman: why?\n\nAssistant:", [" a", " b"], [(1, 0)]),
        id="shp",
    ),
    pytest.param(
        {"prompt": "Q:", "completions": [" a", " b", " c"], "scores": [1, 3, 2.5]},
        "K completions with scores (prompt, completions, scores)",
        ("Q:", [" a", " b", " c"], [(1, 0), (2, 0), (1, 2)]),
        id="scores",
    ),
    pytest.param(
        {"prompt": "Q:", "completions": [" a", " b", " c"], "ranks": [2, 1, 2]},
        "K completions with ranks (prompt, completions, ranks)",
        ("Q:", [" a", " b", " c"], [(1, 0), (1, 2)]),
        id="ranks-with-a-tie",
    ),
]
START = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
ENDED = ["yes<|im_end|>\n", "no<|im_end|>\n"]
TALK = [user("hi")]
CONVERSATIONS = [
    pytest.param({"prompt": TALK, "chosen": [assistant("yes")], "rejected": [assistant("no")]}, id="completion-turns"),
    pytest.param({"prompt": TALK, "chosen": "yes", "rejected": "no"}, id="completion-text"),
    pytest.param(
        {"prompt": TALK, "chosen": [*TALK, assistant("yes")], "rejected": [*TALK, assistant("no")]}, id="whole"
    ),
    pytest.param({"chosen": [*TALK, assistant("yes")], "rejected": [*TALK, assistant("no")]}, id="implicit"),
    pytest.param(
        {"prompt": "hi", "chosen": [*TALK, assistant("yes")], "rejected": [*TALK, assistant("no")]}, id="ultrafeedback"
    ),
    pytest.param({"prompt": "hi", "chosen": [assistant("yes")], "rejected": [assistant("no")]}, id="text-prompt"),
    pytest.param({"prompt": TALK, "completions": ["yes", "no"], "scores": [2, 1]}, id="scores"),
    pytest.param(
        {"completions": [[*TALK, assistant("yes")], [*TALK, assistant("no")]], "ranks": [1, 2]}, id="ranks-implicit"
    ),
]


@pytest.mark.parametrize(("row", "name", "expected"), CASES)
def test_plain_formats(row: dict[str, Any], name: str, expected: tuple[str, list[str], list[tuple[int, int]]]) -> None:
    data = load([row, row])
    assert data.report.format == name
    assert name in data.report.lines()[0]
    prompt, completions, pairs = expected
    assert data.texts(0) == {"prompt": prompt, "completions": completions}
    assert data[0].pairs == pairs
    assert [group.row for group in data] == [1, 2]
    tokenizer = tiny.chatml()
    assert tokenizer.decode(data[0].prompt) == prompt
    assert [tokenizer.decode(ids) for ids in data[0].completions] == [text + "<|im_end|>" for text in completions]


@pytest.mark.parametrize("row", CONVERSATIONS)
def test_conversations(row: dict[str, Any]) -> None:
    data = load([row])
    assert data.report.format.startswith("conversational, ")
    assert data.texts(0) == {"prompt": START, "completions": ENDED}
    group, tokenizer = data[0], tiny.chatml()
    assert group.pairs == [(0, 1)]
    assert group.prompt == tokenizer.apply_chat_template(TALK, add_generation_prompt=True)["input_ids"]
    assert [tokenizer.decode(ids) for ids in group.completions] == ["yes<|im_end|>", "no<|im_end|>"]


def test_conversation_without_generation_prompt_and_with_its_own_bos() -> None:
    data = load([{"prompt": TALK, "chosen": "yes ", "rejected": "no"}], tiny.llama2())
    assert data.texts(0) == {"prompt": "<s>[INST] hi [/INST]", "completions": [" yes </s>", " no </s>"]}
    group = data[0]
    assert list(group.prompt).count(1) == 1
    assert group.prompt[0] == 1
    assert [list(ids).count(2) for ids in group.completions] == [1, 1]
    assert group.completions[0][-1] == 2
    spaced = tiny.llama2().convert_ids_to_tokens(group.completions[0])
    assert "".join(spaced) == "▁yes▁</s>"  # one marker, from the template's own space


def test_turns_shared_by_both_completions_belong_to_the_prompt() -> None:
    shared = [user("hi"), assistant("good"), user("why?")]
    row = {"chosen": [*shared, assistant("yes")], "rejected": [*shared, assistant("no")]}
    longer = {"prompt": TALK, **row}
    for data in (load([row]), load([longer])):
        texts = data.texts(0)
        assert texts["prompt"].endswith("user\nwhy?<|im_end|>\n<|im_start|>assistant\n")
        assert texts["completions"] == ENDED


BAD_CONVERSATIONS = [
    ({"prompt": TALK, "chosen": [assistant("")], "rejected": "no"}, "empty completion"),
    ({"prompt": TALK, "chosen": TALK, "rejected": "no"}, "empty completion"),
    ({"prompt": TALK, "chosen": "yes", "rejected": [assistant("yes")]}, "identical chosen and rejected"),
    ({"prompt": TALK, "chosen": None, "rejected": "no"}, "field 'chosen' missing"),
    ({"prompt": None, "chosen": "yes", "rejected": "no"}, "field 'prompt' missing"),
    ({"prompt": 3, "chosen": "yes", "rejected": "no"}, "field 'prompt' is not a list of messages"),
    ({"prompt": TALK, "chosen": [{"content": "yes"}], "rejected": "no"}, "field 'chosen' has a message without a role"),
    ({"prompt": TALK, "chosen": [{"role": "assistant"}], "rejected": "no"}, "has a message without text content"),
    ({"prompt": [], "chosen": "yes", "rejected": "no"}, "conversation without a shared prompt turn"),
    (
        {"prompt": TALK, "chosen": [assistant("a"), user("b"), assistant("c")], "rejected": "no"},
        "completion with a turn that is not the assistant's",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD_CONVERSATIONS)
def test_bad_conversations_are_counted(row: dict[str, Any], reason: str) -> None:
    good = {"prompt": TALK, "chosen": "yes", "rejected": "no"}
    report = load([good, row], max_bad_fraction=0.5).report
    ((found, dropped),) = report.dropped.items()
    assert reason in found
    assert (dropped.count, dropped.first_rows) == (1, [2])


class Templated:
    """A tokenizer's place in `Chat`, with the template as a Python function."""

    chat_template = "stands for one"

    def __init__(self, write: Any):
        self._write = write

    def apply_chat_template(self, messages: Any, *, tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize
        return self._write([turn["content"] for turn in messages], add_generation_prompt)


def test_template_that_differs_in_white_space_is_handled() -> None:
    chat = Chat(Templated(lambda texts, generate: "A: ".join(texts) + ("A:\n" if generate else "")))
    assert chat.render([user("hi ")], [[assistant("yes")]]) == ("hi A:\n", ["yes"])


def test_template_that_is_not_prefix_preserving_is_refused() -> None:
    chat = Chat(Templated(lambda texts, generate: "|".join(texts) + ("|<think>" if generate else "")))
    with pytest.raises(BadRow) as caught:
        chat.render([user("hi")], [[assistant("yes")]])
    assert caught.value.reason == "chat template that is not prefix-preserving"
    assert "<think>" in caught.value.detail
    assert "yes" in caught.value.detail


def test_template_that_refuses_the_messages() -> None:
    tokenizer = tiny.chatml()
    previous = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    )
    try:
        rows = [{"chosen": [{"role": "system", "content": "x"}, assistant(a)], "rejected": "n"} for a in "ab"]
        with pytest.raises(UserError, match=r"chat template refuses the messages 2 \(rows 1, 2: .*no system turn\)"):
            load([{**row, "prompt": [{"role": "system", "content": "x"}]} for row in rows])
    finally:
        tokenizer.chat_template = previous


def test_conversation_needs_a_template() -> None:
    with pytest.raises(UserError, match="expected a tokenizer with a chat template") as caught:
        load([{"prompt": TALK, "chosen": "yes", "rejected": "no"}], tiny.bos_first())
    assert "\n" not in str(caught.value)


def test_options_reach_the_template() -> None:
    tokenizer = tiny.chatml()
    previous = tokenizer.chat_template
    tokenizer.chat_template = "{{ mood }}" + previous
    try:
        data = load([{"prompt": TALK, "chosen": "yes", "rejected": "no"}], chat_options={"mood": "calm"})
        assert data.texts(0)["prompt"] == "calm" + START
    finally:
        tokenizer.chat_template = previous


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "chosen": "b"}, {"completions": ["a", "b"], "scores": [1, 2]}, {"text": "a"}, {}],
    ids=["no-rejected", "no-prompt", "text", "empty"],
)
def test_unknown_columns_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected the columns prompt, chosen, rejected;") as caught:
        recognise([row], label="--data x.jsonl", chat=Chat(tiny.chatml()))
    assert str(caught.value).startswith("--data x.jsonl: ")
    assert str(caught.value).endswith(f"found {', '.join(row) or 'no columns'}")
    assert "\n" not in str(caught.value)


def test_hh_transcripts_that_part_early_are_bad() -> None:
    early = "\n\nHuman: hello\n\nAssistant: hey\n\nHuman: bad?\n\nAssistant: No."
    rows = [{"chosen": HH + " Yes.", "rejected": HH + " No."}] * 9 + [{"chosen": HH + " Yes.", "rejected": early}]
    report = load(rows, max_bad_fraction=0.2).report
    assert list(report.dropped) == ["transcripts that part before the last assistant turn"]


def test_bad_completion_of_several_leaves_the_others() -> None:
    row = {"prompt": "Q:", "completions": [" a", " ", " b", " a", " c"], "scores": [3, 9, 2, 1, 3]}
    data = load([row])
    group = data[0]
    assert data.texts(0)["completions"] == [" a", " b", " a", " c"]
    assert group.pairs == [(0, 1), (1, 2), (3, 1), (3, 2)]
    assert data.num_pairs(0) == 4
    assert data.report.ties == 1
    assert data.report.pairs_dropped == {"empty completion": 4, "identical chosen and rejected": 1}
    assert "left out 1 pairs of equal score" in data.report.lines()


@given(st.text("ab", max_size=9), st.text("ab", max_size=9))
def test_common_prefix(a: str, b: str) -> None:
    shared = common_prefix(a, b)
    assert a.startswith(shared)
    assert b.startswith(shared)
    assert len(shared) == min(len(a), len(b)) or a[len(shared)] != b[len(shared)]


def test_prune_needs_a_pair_that_is_left() -> None:
    from dpo.formats import Record

    record = Record(1, "p", ["a", "a", ""], [(0, 1), (0, 2), (1, 2)])
    with pytest.raises(BadRow, match="empty completion"):
        prune(record, record.completions)
