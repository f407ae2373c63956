"""The command `dpo`: flags to a configuration, a configuration to the function that does the work."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from dpo import __version__
from dpo.config import (
    CacheConfig,
    DemoConfig,
    DoctorConfig,
    LossesConfig,
    MergeConfig,
    ReportConfig,
    ScoreConfig,
    TrainConfig,
    yaml_to_args,
)
from dpo.errors import Stopped, UserError

Command = (
    Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[CacheConfig, tyro.conf.subcommand("cache")]
    | Annotated[ScoreConfig, tyro.conf.subcommand("score")]
    | Annotated[MergeConfig, tyro.conf.subcommand("merge")]
    | Annotated[LossesConfig, tyro.conf.subcommand("losses")]
    | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
    | Annotated[DoctorConfig, tyro.conf.subcommand("doctor")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
)
_CONFIGS = {"train": TrainConfig, "cache": CacheConfig, "score": ScoreConfig}


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
        config: Any = tyro.cli(
            Command,  # pyright: ignore[reportArgumentType]
            prog="dpo",
            description="Direct Preference Optimization with one packed, prefix-shared forward pass.",
            args=_with_config_file(words),
        )
        run(config)
    except UserError as error:
        print(f"dpo: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Stopped as error:
        print(f"dpo: {error}", file=sys.stderr)
        raise SystemExit(error.status) from None
    except KeyboardInterrupt:
        print("dpo: interrupted", file=sys.stderr)
        raise SystemExit(130) from None


def run(config: Any) -> None:
    """Does what a configuration asks for."""
    # torch and transformers take seconds to import: not for --help
    if isinstance(config, TrainConfig):
        from dpo.train import train

        train(config)
    elif isinstance(config, CacheConfig):
        from dpo.cache import cache

        cache(config)
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
    else:
        from dpo.demo.run import demo

        demo(config)


def _with_config_file(words: list[str]) -> list[str]:
    """Puts the settings of `--config FILE` before the flags, which therefore win."""
    if not words or words[0] not in _CONFIGS:
        return words
    for k, word in enumerate(words):
        path = word.removeprefix("--config=") if word.startswith("--config=") else None
        if word == "--config" and k + 1 < len(words):
            path = words[k + 1]
        if path:
            return [words[0], *yaml_to_args(path, _CONFIGS[words[0]]), *words[1:]]
    return words


if __name__ == "__main__":
    main()
