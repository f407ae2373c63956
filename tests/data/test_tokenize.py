"""The token rules: what generation sees, exactly one end-of-sequence, truncation."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from dpo.data import load_preferences
from dpo.errors import UserError
from dpo.tokenize import Codec, _boundaries
from tests.data import tiny

PIECES = [
    " ",
    "\n",
    "a",
    "The",
    " quick",
    "fox.",
    "un",
    "happy",
    "  ",
    "café",
    "猫",
    "😀",
    "12",
    "'s",
    "user",
    "(",
    "\n\nHuman:",
]
texts = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
tokenizers = st.sampled_from(tiny.ALL)
lengths = st.one_of(st.none(), st.integers(1, 12))


def codec(tokenizer: Any, eos: list[int] | None = None) -> Codec:
    return Codec(tokenizer, eos or tiny.eos_of(tokenizer))


@settings(deadline=None, max_examples=200)
@given(make=tokenizers, prompt=texts, completion=texts)
def test_prompt_is_what_generation_gets_and_ids_decode_to_the_text(make: Any, prompt: str, completion: str) -> None:
    tokenizer = make()
    rules = codec(tokenizer)
    (ids,) = rules.prompts([prompt], templated=False)
    generated_from = tokenizer(prompt)["input_ids"]
    if generated_from[-1:] == [tokenizer.eos_token_id]:
        generated_from = generated_from[:-1]
    assert ids == generated_from

    (answer,) = rules.completions([completion])
    body = ids[len(rules.start) :]
    if body:  # a decoder takes one leading space away, which is the prompt's where there is a prompt
        assert tokenizer.decode(body + answer) == tokenizer.decode(body) + completion
        assert tokenizer.decode(body).strip() == prompt.strip()


@pytest.mark.parametrize("make", tiny.ALL, ids=lambda make: make.__name__)
def test_completion_brings_no_space_that_is_not_there(make: Any) -> None:
    tokenizer = make()
    rules = codec(tokenizer)
    spaced, bare = rules.completions([" quick", "quick"])
    assert bare
    assert spaced != bare
    (prompt,) = rules.prompts(["The"], templated=False)
    assert tokenizer.decode(prompt + bare, skip_special_tokens=True).strip() == "Thequick"
    assert tokenizer.decode(prompt + spaced, skip_special_tokens=True).strip() == "The quick"


@pytest.mark.parametrize("make", [tiny.metaspace, tiny.llama2, tiny.prefix_space], ids=lambda make: make.__name__)
def test_these_tokenizers_do_put_a_space_in_front(make: Any) -> None:
    tokenizer = make()
    own = tokenizer("quick", add_special_tokens=False)["input_ids"]
    assert own != codec(tokenizer).completions(["quick"])[0]


def test_bos_convention() -> None:
    assert codec(tiny.chatml()).start == []
    assert codec(tiny.bos_first()).start == codec(tiny.bos_and_eos()).start == codec(tiny.llama2()).start == [1]
    rules = codec(tiny.bos_first())
    assert rules.prompts([""], templated=False) == [[1]]
    assert rules.prompts(["<s>The"], templated=False) == rules.prompts(["The"], templated=False)  # never two
    assert codec(tiny.chatml()).prompts([""], templated=False) == [[]]


def test_text_that_ends_a_generation_ends_the_completion() -> None:
    tokenizer = tiny.chatml()
    end, other = tokenizer.convert_tokens_to_ids(["<|im_end|>", "</s>"])
    rules = codec(tokenizer, [other, end])
    assert rules.eos_token_id == end  # the tokenizer's own, as it is one of them
    a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
    newline = tokenizer("\n")["input_ids"]
    assert rules.close([a, b]) == ([a, b, end], False)
    assert rules.close([a, end]) == ([a, end], False)
    assert rules.close([a, other]) == ([a, other], False)
    assert rules.close([a, end, *newline]) == ([a, end], False)
    assert rules.close([a, end, end]) == ([a, end], False)
    assert rules.close([a, end, b]) == ([a, end], True)
    assert rules.close([]) == rules.close([end]) == ([], False)
    assert codec(tokenizer, [other]).eos_token_id == other
    with pytest.raises(UserError, match="end-of-sequence"):
        Codec(tokenizer, [])


def test_truncated_prompt_keeps_its_end_and_its_bos() -> None:
    rules = codec(tiny.bos_first())
    assert rules.cut_prompt([1, 7, 8, 9], 4) == rules.cut_prompt([1, 7, 8, 9], None) == [1, 7, 8, 9]
    assert rules.cut_prompt([1, 7, 8, 9], 3) == [1, 8, 9]
    assert rules.cut_prompt([1, 7, 8, 9], 1) == [9]
    assert codec(tiny.chatml()).cut_prompt([7, 8, 9], 2) == [8, 9]


@settings(deadline=None, max_examples=150)
@given(
    make=tokenizers,
    rows=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4),
    prompt_limit=lengths,
    limit=lengths,
    total=st.one_of(st.none(), st.integers(4, 24)),
)
def test_loaded_groups_keep_every_promise(
    make: Any, rows: list[tuple[str, str, str]], prompt_limit: int | None, limit: int | None, total: int | None
) -> None:
    tokenizer = make()
    sure = {"prompt": "a", "chosen": "a", "rejected": "(fox"}
    data = load_preferences(
        [*({"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in rows), sure],
        tokenizer,
        max_prompt_length=prompt_limit,
        max_completion_length=limit,
        max_length=total,
        eos_token_ids=tiny.eos_of(tokenizer),
        max_bad_fraction=1.0,
    )
    rules = codec(tokenizer)
    report = data.report
    assert report.rows == len(rows) + 1 == report.bad_rows + len(data)
    assert [group.row for group in data] == sorted(group.row for group in data)
    truncated = 0
    for i, group in enumerate(data):
        assert data.lengths(i) == (len(group.prompt), [len(ids) for ids in group.completions])
        assert data.num_pairs(i) == len(group.pairs) == 1
        assert 1 <= len(group.prompt) <= (prompt_limit or 10**6)
        given_texts = data.texts(i)
        (whole_prompt,) = rules.prompts([given_texts["prompt"]], templated=False)
        assert group.prompt == rules.cut_prompt(whole_prompt, prompt_limit)
        assert group.completions[0] != group.completions[1]
        for ids, text in zip(group.completions, given_texts["completions"], strict=True):
            whole, _ = rules.close(rules.completions([text])[0])
            assert len(whole) > 1
            assert whole[-1] == tokenizer.eos_token_id
            assert whole.count(tokenizer.eos_token_id) == 1
            assert 1 <= len(ids) <= min(limit or 10**6, (total or 10**6) - len(group.prompt))
            assert ids == whole[: len(ids)]
            truncated += len(ids) < len(whole)
            assert (tokenizer.eos_token_id in ids) == (len(ids) == len(whole))
    assert report.truncated_completions == truncated


# --- Implicit prompts: where two texts part ---------------------------------------------------------------------------


@pytest.mark.parametrize("make", tiny.ALL, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("a", "b", "prompt"),
    [
        ("It was a good day", "It was a bad night", "It was a"),
        ("It was unhappy", "It was unlucky", "It was"),  # not inside a word
        ("It was", "It was a good day", "It"),  # something is left of both
        ("yes: (good)", "yes: (bad)", "yes: ("),
        ("good", "bad", ""),
        ("Answer: 😀 ok", "Answer: 😃 ok", "Answer:"),  # not inside a character
        ("no\n\nAssistant: hi", "no\n\nAssistant: hello", "no\n\nAssistant:"),
        ("Answer:\ngood", "Answer:\nbad", "Answer:\n"),
    ],
)
def test_common_prefix_is_cut_where_no_token_is_split(make: Any, a: str, b: str, prompt: str) -> None:
    (cut,) = codec(make()).cut_points([(a, b)])
    assert a[:cut] == b[:cut] == prompt


def test_no_boundary_where_a_token_reaches_into_a_character() -> None:
    # "a" with the first byte of "é" in one token, the second byte in the next, then "b".
    assert _boundaries([(0, 2), (1, 2), (2, 3)], 3).tolist() == [0, 2]
    assert _boundaries([(0, 1), (1, 3), (3, 4)], 2).tolist() == [0, 1]
    assert _boundaries([], 3).tolist() == []


@settings(deadline=None, max_examples=150)
@given(make=tokenizers, shared=texts, a=texts, b=texts)
# here a token of one text reaches over what is a boundary of the other
@example(make=tiny.metaspace, shared="x\n", a="a", b="\nHuman")
@example(make=tiny.metaspace, shared="x\n", a="\nHuman", b="a")
@example(make=tiny.llama2, shared="(", a="x", b="brackets")
def test_cut_splits_no_token_of_either_text(make: Any, shared: str, a: str, b: str) -> None:
    a, b = shared + a, shared + b
    if a == b or not a or not b:
        return
    rules = codec(make())
    (cut,) = rules.cut_points([(a, b)])
    assert a[:cut] == b[:cut]
    assert cut < min(len(a), len(b))
    assert rules._plain is not None
    for text in (a, b):
        spans = rules._plain.encode(text, add_special_tokens=False).offsets
        assert all(stop <= cut or start >= cut for start, stop in spans)


# --- Tokenizers without a `tokenizers` backend ------------------------------------------------------------------------


class Slow:
    """A tokenizer seen only through the methods that every tokenizer has."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.eos_token_id, self.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)


@pytest.mark.parametrize("make", [tiny.llama2, tiny.metaspace, tiny.chatml], ids=lambda make: make.__name__)
def test_slow_tokenizer_gives_the_same_tokens(make: Any) -> None:
    fast, slow = codec(make()), codec(Slow(make()), tiny.eos_of(make()))
    words = ["quick", " quick", "a good day", "(yes)"]
    assert slow.completions(words) == fast.completions(words)
    assert slow.prompts(words, templated=False) == fast.prompts(words, templated=False)
    assert slow.cut_points([("It was good", "It was bad")]) == [6]


def test_byt5_which_is_all_python() -> None:
    tokenizer = ByT5Tokenizer()
    rules = codec(tokenizer)
    assert rules.start == []
    assert rules.prompts(["hé"], templated=False) == [tokenizer("hé", add_special_tokens=False)["input_ids"]]
    assert rules.close(rules.completions(["é"])[0]) == ([*tokenizer("é")["input_ids"]], False)
