"""The command `dpo`: flags to a configuration, a configuration to the function that does the work."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn, Union

import tyro

from dpo import __version__
from dpo.commands import (
    CacheConfig,
    DemoConfig,
    DoctorConfig,
    LossesConfig,
    MergeConfig,
    PlanConfig,
    ReportConfig,
    ScoreConfig,
)
from dpo.config import TrainConfig, yaml_to_args
from dpo.errors import Stopped, UserError
from dpo.flags import by_topic, check_command, check_words, flat

COMMANDS: dict[str, type] = {
    "train": TrainConfig,
    "cache": CacheConfig,
    "score": ScoreConfig,
    "merge": MergeConfig,
    "losses": LossesConfig,
    "plan": PlanConfig,
    "demo": DemoConfig,
    "doctor": DoctorConfig,
    "report": ReportConfig,
}
_READ_YAML = {"train", "cache", "score"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `dpo` and exits: 0 on success, 1 when `dpo doctor` finds a problem, 2 for what the user can mend, 128 + the
    signal when stopped by one."""
    words = list(sys.argv[1:] if argv is None else argv)
    # data workers fork after the tokenizer has run threads, and never tokenise: its warning about that is moot
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if words == ["--version"]:
        print(f"fused-dpo {__version__}")
        return
    try:
        run(parse(words))
    except UserError as error:
        _end(f"dpo: {error}", 2)
    except Stopped as error:
        _end(f"dpo: {error}", error.status)
    except KeyboardInterrupt:
        _end("dpo: interrupted", 130)
    except BrokenPipeError:  # whoever read the output has seen enough: | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is flushed at the end
        raise SystemExit(128 + signal.SIGPIPE) from None
    except Exception:
        if not _one_of_several():
            raise
        _end(traceback.format_exc().rstrip(), 1)


def parse(words: Sequence[str]) -> Any:
    """The configuration that command-line words ask for. UserError for words that ask for none."""
    check_command(words, COMMANDS)
    words = _with_config_file(words)
    if words[0] in COMMANDS:
        check_words(words[0], COMMANDS[words[0]], words[1:])
    kinds = (Annotated[by_topic(kind), tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
    known: Any = Union[tuple(kinds)]  # noqa: UP007
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            parsed = tyro.cli(
                known,
                prog="dpo",
                description="Direct Preference Optimization with one packed, prefix-shared forward pass.",
                args=words,
                console_outputs=not _one_of_several() or os.environ["RANK"] == "0",
            )
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
        raise UserError(" ".join(re.sub("[\u2500-\u257f]", " ", told.getvalue()).split())) from None
    return flat(parsed)


def _together(function: Callable[[Any], object], config: Any) -> None:
    """Runs a command with the other processes that torchrun started, where it did."""
    from dpo.console import console
    from dpo.distributed import is_main, joined
    from dpo.inputs import resolve_device

    with joined(resolve_device(config.device).type):
        console.quiet = not is_main()
        function(config)


def _one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def _end(message: str, status: int) -> NoReturn:
    """Prints a message and ends the process; under torchrun it ends every rank, and one of them prints."""
    if _one_of_several() and "torch" in sys.modules:
        from dpo.distributed import end_all

        end_all(message, status)
    if not _one_of_several() or os.environ["RANK"] == "0":
        print(message, file=sys.stderr)
    raise SystemExit(status) from None


def run(config: Any) -> None:
    """Does what a configuration asks for."""
    # torch and transformers take seconds to import: not for --help
    if isinstance(config, TrainConfig):
        from dpo.train import train

        _together(train, config)
    elif isinstance(config, CacheConfig):
        from dpo.cache import cache

        _together(cache, config)
    elif _one_of_several():
        raise UserError("torchrun: expected dpo train or dpo cache, found a command for one process")
    elif isinstance(config, ScoreConfig):
        from dpo.score import score

        score(config)
    elif isinstance(config, ReportConfig):
        from dpo.report import report

        report(config)
    elif isinstance(config, DoctorConfig):
        from dpo.doctor import doctor

        if not doctor(config)["ok"]:
            raise SystemExit(1)
    elif isinstance(config, MergeConfig):
        from dpo.merge_adapter import merge_adapter

        merge_adapter(config)
    elif isinstance(config, LossesConfig):
        from dpo.losses import print_losses

        print_losses(config)
    elif isinstance(config, PlanConfig):
        from dpo.plan_memory import plan

        plan(config)
    else:
        from dpo.demo.run import demo

        demo(config)


def _with_config_file(words: Sequence[str]) -> Sequence[str]:
    """Puts the settings of `--config FILE` before the flags, which therefore win."""
    if words[0] not in _READ_YAML:
        return words
    command = COMMANDS[words[0]]
    for k, word in enumerate(words):
        path = word.removeprefix("--config=") if word.startswith("--config=") else None
        if word == "--config" and k + 1 < len(words):
            path = words[k + 1]
        if path:
            settings = yaml_to_args(path, command)
            check_words(words[0], command, settings, where=f"--config {path}: ", whole=False)
            return [words[0], *settings, *words[1:]]
    return words


if __name__ == "__main__":
    main()
