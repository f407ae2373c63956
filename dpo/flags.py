"""A command's settings as the parser takes them, by topic; and words held against them before they are parsed: what is
wrong with one, in a line."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from dpo.errors import UserError
from dpo.settings import TOPICS

HELP = {"-h", "--help"}
_NUMBERS = {int: "a whole number", float: "a number"}


_ELSEWHERE = {
    "--learning-rate": "--lr",
    "--num-train-epochs": "--epochs",
    "--num-epochs": "--epochs",
    "--output-dir": "--output",
    "--batch-size": "--pairs-per-step",
    "--train-batch-size": "--pairs-per-step",
    "--per-device-train-batch-size": "--pairs-per-step",
    "--model-name-or-path": "--model",
    "--dataset": "--data",
    "--dataset-name": "--data",
    "--loss-type": "--loss",
    "--max-grad-norm": "--grad-clip",
    "--ref-model": "--reference-model",
    "--resume-from-checkpoint": "--resume",
}
"""What other trainers call our flags."""


def by_topic(command: type) -> type:
    """The command with its flags nested by topic, which is how the parser comes to a box of `--help` for each.

    A command whose flags have no topic is returned as it is. `flat` undoes it.
    """
    nested = []
    for topic, kinds in TOPICS.items():
        bases = tuple(kind for kind in reversed(kinds) if issubclass(command, kind))
        if bases:
            together = dataclasses.dataclass(frozen=True, kw_only=True)(type(topic, bases, {"__doc__": ""}))
            nested.append((topic, Annotated[together, tyro.conf.OmitArgPrefixes]))
    if not nested:
        return command
    return dataclasses.make_dataclass(command.__name__, nested, namespace={"__doc__": command.__doc__, "flat": command})


def flat(parsed: Any) -> Any:
    """The settings of a command from what the parser made of `by_topic(command)`."""
    if not hasattr(parsed, "flat"):
        return parsed
    return parsed.flat(**{name: value for topic in vars(parsed).values() for name, value in vars(topic).items()})


@dataclasses.dataclass(frozen=True)
class _Setting:
    name: str
    kind: Any
    """The type of a value, without None."""
    several: bool
    optional: bool
    required: bool
    positional: bool

    @property
    def flag(self) -> str:
        return self.name.upper() if self.positional else "--" + self.name.replace("_", "-")

    @property
    def expected(self) -> str:
        none = " or None" if self.optional else ""
        if get_origin(self.kind) is Literal:
            *others, last = map(str, get_args(self.kind))
            return f"{', '.join(others)} or {last}" if others and not none else ", ".join((*others, last)) + none
        return _NUMBERS.get(self.kind, "a value") + none

    def check(self, word: str, where: str) -> None:
        if self.optional and word == "None":
            return
        good = word in get_args(self.kind) if get_origin(self.kind) is Literal else _reads(self.kind, word)
        if not good:
            raise UserError(f"{where}{self.flag}: expected {self.expected}, found {word!r}")


def _reads(kind: Any, word: str) -> bool:
    try:
        kind(word) if kind in _NUMBERS else None
    except ValueError:
        return False
    return True


def _settings(command: type) -> Iterator[_Setting]:
    hints = get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, marks = hints[field.name], ()
        if get_origin(kind) is Annotated:
            kind, *marks = get_args(kind)
        parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
        kinds = [part for part in parts if part is not type(None)]
        kind = kinds[0] if len(kinds) == 1 else Any  # the parser's own words are good enough for a union
        several = get_origin(kind) is tuple
        kind = get_args(kind)[0] if several else kind
        required, positional = field.default is dataclasses.MISSING, tyro.conf.Positional in marks
        yield _Setting(field.name, kind, several, type(None) in parts, required, positional)


def check_command(words: Sequence[str], commands: Mapping[str, type]) -> None:
    """Raises UserError unless the first word is a command (or asks for help)."""
    if words and (words[0] in commands or words[0] in HELP):
        return
    near = difflib.get_close_matches(words[0], commands, n=1) if words else []
    meant = f" (did you mean {near[0]}?)" if near else ""
    found = repr(words[0]) if words else "none"
    raise UserError(f"expected a command ({', '.join(commands)}; see dpo --help), found {found}{meant}")


def check_words(command: str, config: type, words: Sequence[str], *, where: str = "", whole: bool = True) -> None:
    """Raises UserError for an unknown flag, a value that it cannot have, or a flag that is missing.

    Args:
        config: the command's settings, flags by name.
        words: what follows the command.
        where: put in front of errors, such as the file that the words are from.
        whole: these are all words there are: what is required must be among them.
    """
    if HELP & set(words):
        return
    settings = list(_settings(config))
    given = set(_given(command, settings, words, where))
    for setting in settings:
        if whole and setting.required and setting.flag not in given:
            raise UserError(f"{where}{setting.flag}: expected a value, found none: dpo {command} needs it")


def _given(command: str, settings: Sequence[_Setting], words: Sequence[str], where: str) -> Iterator[str]:
    """The flags among the words, each checked with its values."""
    flags = {setting.flag: setting for setting in settings if not setting.positional}
    places = [setting.flag for setting in settings if setting.positional]
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            if not places:
                after = f" after {words[-len(left) - 2]}" if len(left) + 1 < len(words) else ""
                raise UserError(f"{where}dpo {command}: expected a flag{after}, found {word!r}")
            yield places.pop(0)
            continue
        name, inline, value = word.partition("=")
        setting = _known(name.replace("_", "-"), flags, command, where)
        yield setting.flag
        if setting.kind is bool:
            if inline:
                raise UserError(f"{where}{setting.flag}: expected no value, found {value!r}")
            continue
        values = [value] if inline else list(itertools.takewhile(lambda word: not word.startswith("--"), left))
        values = values if setting.several else values[:1]
        left = left if inline else left[len(values) :]
        if not values and not setting.several:
            raise UserError(f"{where}{setting.flag}: expected {setting.expected}, found nothing after it")
        for found in values:
            setting.check(found, where)


def _known(name: str, flags: Mapping[str, _Setting], command: str, where: str) -> _Setting:
    found = flags.get(name) or flags.get(name.replace("--no-", "--", 1))
    if found is not None and (name in flags or found.kind is bool):
        return found
    elsewhere = _ELSEWHERE.get(name)
    near = [elsewhere] if elsewhere in flags else difflib.get_close_matches(name, flags, n=1, cutoff=0.75)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise UserError(f"{where}{name}: expected a flag of dpo {command}, found none of that name{meant}")
