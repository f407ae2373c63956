"""`dpo report`: one HTML page about a run. Style, script and figures are in it; it loads nothing from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from dpo.charts import Series, histogram, lines, number, scatter
from dpo.commands import ReportConfig
from dpo.config import TrainConfig, defaults_of
from dpo.console import say
from dpo.curves import smooth
from dpo.durable import write_text
from dpo.errors import UserError
from dpo.metrics import read_json_lines

Record = Mapping[str, Any]
MOST_SAMPLES, MOST_OPEN = 24, 6
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True)
class Run:
    """What a run folder holds; parts that it lacks are empty."""

    folder: Path
    settings: dict[str, Any]
    steps: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    skipped: list[int]
    """Steps whose update was skipped."""
    facts: dict[str, Any]


def report(config: ReportConfig) -> Path:
    """Writes the page of a run.

    Returns:
        its path: --output, or report.html in the run folder.
    Raises:
        UserError: the folder is not a run's, or the page cannot be written.
    """
    run = read_run(Path(config.run))
    path = Path(config.output) if config.output else run.folder / "report.html"
    try:
        write_text(path, page(run))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{run.folder}: expected the records of a run, found others ({type(error).__name__}: {error})"
        ) from error
    except OSError as error:
        raise UserError(f"--output {path}: expected a file to write to, found: {error.strerror or error}") from error
    say(f"wrote {path}")
    return path


def read_run(folder: Path) -> Run:
    """Reads a run folder. Raises UserError where it is none, or a file of it is damaged."""
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder}: expected the folder of a run (config.yaml, metrics.jsonl), found none")
    settings = _read(folder / "config.yaml", yaml.safe_load)
    facts = _read(folder / "facts.json", json.loads) if (folder / "facts.json").exists() else {}
    names = ("metrics", "eval", "eval_pairs", "samples", "warnings")
    steps, evals, pairs, samples, warnings = (
        read_json_lines(path) if (path := folder / f"{name}.jsonl").exists() else [] for name in names
    )
    for path, value in ((folder / "config.yaml", settings), (folder / "facts.json", facts)):
        if not isinstance(value, dict):
            raise UserError(f"{path}: expected settings by name, found a {type(value).__name__}")
    skipped = [record["step"] for record in steps if record.get("skipped")]
    steps = [record for record in steps if record.get("loss") is not None]
    return Run(folder, settings, steps, evals, pairs, samples, warnings, skipped, facts)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: expected what a run wrote, found: {' '.join(str(error).split())[:200]}") from error


def page(run: Run) -> str:
    """The whole page."""
    name = run.folder.resolve().name
    style, script = ((resources.files("dpo") / f"report.{kind}").read_text("utf-8") for kind in ("css", "js"))
    sections = [
        _tiles(run),
        _warnings(run),
        _section("Training", _curves(run)),
        _section("Held-out pairs", _pairs(run)),
        _section("Samples", _samples(run)),
        _section("Data", _data(run)),
        _section("Settings", _settings(run)),
        _section("Machine", _machine(run)),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><style>{style}</style></head>'
        f"<body><main><h1>{escape(name)}</h1><p class='sub'>{escape(_summary(run))}</p>{''.join(sections)}"
        f"<footer>Fused DPO {escape(str(run.facts.get('versions', {}).get('fused-dpo', '')))}</footer></main>"
        f"<script>{script}</script></body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _summary(run: Run) -> str:
    settings, model = run.settings, run.facts.get("model", {})
    size = f", {_count(model['parameters'])} parameters" if model else ""
    seconds = sum(record["step_seconds"] for record in run.steps)
    return (
        f"{settings.get('model')}{size} · {settings.get('loss')} loss, beta {settings.get('beta')}, "
        f"{settings.get('optimizer')} at {settings.get('lr')} · {len(run.steps)} steps of "
        f"{fmean(r['pairs'] for r in run.steps):.0f} pairs in {_duration(seconds)}"
        if run.steps
        else f"{settings.get('model')}{size} · no step yet"
    )


def _count(number_of: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number_of >= unit:
            return f"{number_of / unit:.3g}{name}"
    return str(number_of)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _tiles(run: Run) -> str:
    tiles: list[tuple[str, str, str]] = []
    if run.evals:
        first, last = run.evals[0], run.evals[-1]
        pairs = f"{last['pairs']} pairs"
        tiles.append(("held-out accuracy", f"{last['accuracy']:.3f}", f"from {first['accuracy']:.3f}, {pairs}"))
        tiles.append(("held-out margin", f"{last['margin']:+.3f}", f"loss {first['loss']:.3f} to {last['loss']:.3f}"))
        change = last["chosen_logps_per_token"] - first["chosen_logps_per_token"]
        tiles.append(("chosen log-probs", f"{change:+.3f}", "nats a token, held out"))
        if last.get("kl") is not None:
            error = f" ± {last['kl_se']:.2f}" if last.get("kl_se") is not None else ""
            tiles.append(("KL to the reference", f"{last['kl']:.2f}{error}", "nats a sample"))
    elif run.steps:
        newest = run.steps[-10:]
        tiles.append(("training accuracy", f"{fmean(r['accuracy'] for r in newest):.3f}", "newest steps"))
        tiles.append(("training margin", f"{fmean(r['margin'] for r in newest):+.3f}", "newest steps"))
    if run.steps:
        seconds = sum(r["step_seconds"] for r in run.steps)
        pairs_a_second = sum(r["pairs"] for r in run.steps) / max(seconds, 1e-9)
        tokens = sum(r["tokens_per_second"] * r["step_seconds"] for r in run.steps) / max(seconds, 1e-9)
        tiles.append(("speed", f"{pairs_a_second:,.1f}", f"pairs/s, {tokens:,.0f} tokens/s"))
        tiles.append(("peak memory", f"{max(r['peak_memory_bytes'] for r in run.steps) / 2**30:.2f}", "GiB"))
    cells = [
        f"<div class='tile'><span>{escape(a)}</span><b>{escape(b)}</b><i>{escape(c)}</i></div>" for a, b, c in tiles
    ]
    return f"<div class='tiles'>{''.join(cells)}</div>" if cells else ""


def _warnings(run: Run) -> str:
    skipped = run.skipped
    parts = [
        f"<div class='warning'><b>{escape(w['sign'])}</b><p>Step {w['step']}: {escape(w['message'])}.</p>"
        f"<p>{escape(w['advice'])}.</p></div>"
        for w in run.warnings
    ]
    if skipped:
        steps = ", ".join(map(str, skipped[:12])) + (", .." if len(skipped) > 12 else "")
        parts.append(
            f"<div class='warning'><b>{len(skipped)} updates skipped</b><p>Loss or gradient was not finite at steps "
            f"{steps}.</p></div>"
        )
    checked = "<p class='fine'>No sign of trouble: log-probs, margins, loss and lengths are within their bounds.</p>"
    return _section("Warnings", "".join(parts)) or (_section("Warnings", checked) if run.steps else "")


def _curves(run: Run) -> str:
    steps, evals = run.steps, run.evals
    if not steps:
        return ""
    x = [r["step"] for r in steps]
    weight = min(0.9, max(0.0, 1 - 2 / math.sqrt(len(x))))  # a short run shows its own shape

    def trained(name: str, label: str, colour: str, every: bool = False) -> list[Series]:
        y = [r[name] for r in steps]
        smoothed = Series(label, x, smooth(y, weight), colour)
        return [Series(label, x, y, colour, "faint"), smoothed] if every else [smoothed]

    def held_out(name: str, label: str = "held out", colour: str = "ink") -> Series:
        found = [(r["step"], r[name]) for r in evals if r.get(name) is not None]
        return Series(label, [k for k, _ in found], [v for _, v in found], colour, "dots")

    epochs = [b["step"] for a, b in pairwise(steps) if b["epoch"] != a["epoch"]]
    starts_at_ln2 = abs(steps[0]["loss"] - math.log(2)) < 1e-3
    norms = [(r["step"], r["grad_norm"]) for r in steps if r.get("grad_norm")]
    before_clipping = Series("before clipping", [k for k, _ in norms], [v for _, v in norms], "a")
    sides = (("chosen", "a"), ("rejected", "b"))
    figures = [
        lines(
            "Loss",
            [*trained("loss", "training", "a", every=True), held_out("loss")],
            rule=(math.log(2), "ln 2") if starts_at_ln2 else None,
            marks=epochs,
            note="vertical lines: epochs" if epochs else "",
        ),
        lines(
            "Reward accuracy",
            [*trained("accuracy", "training", "a", every=True), held_out("accuracy")],
            y_range=(0.0, 1.04),
            rule=(0.5, "chance"),
            marks=epochs,
        ),
        lines(
            "Rewards",
            [s for side, c in sides for s in (*trained(f"{side}_reward", side, c), held_out(f"{side}_reward", "", c))],
            marks=epochs,
            note="beta times the log ratio to the reference; dots: held out",
        ),
        lines("Margin", [*trained("margin", "training", "c", every=True), held_out("margin")], marks=epochs),
        lines(
            "Log-probs a token",
            [s for side, c in sides for s in trained(f"{side}_logps_per_token", side, c)],
            marks=epochs,
            note="nats, training pairs of each step, smoothed",
        ),
        lines("Gradient norm", [before_clipping], log=True),
    ]
    if any("length_correlation" in r for r in steps):
        figures.append(
            lines(
                "Reward with length",
                trained("length_correlation", "correlation within pairs", "c", every=True),
                y_range=(-1.05, 1.05),
                rule=(0.0, ""),
            )
        )
    figures.append(lines("Learning rate", [Series("learning rate", x, [r["lr"] for r in steps], "a")]))
    kl = [r for r in evals if r.get("kl") is not None]
    if kl:
        spread = [r.get("kl_se") or 0.0 for r in kl]
        series = Series("estimate", [r["step"] for r in kl], [r["kl"] for r in kl], "a", "dots", spread)
        figures.append(lines("KL to the reference", [series], note="nats a sample; band: one standard error"))
    return f"<div class='grid-of'>{''.join(figures)}</div>"


def _pairs(run: Run) -> str:
    pairs = run.pairs
    if not pairs:
        return "" if run.evals else "<p class='sub'>This run has no held-out data (--eval-data, --eval-fraction).</p>"
    chosen, rejected = ([p[f"{side}_reward"] for p in pairs] for side in ("chosen", "rejected"))
    lengths = [[p[f"{side}_tokens"] for p in pairs] for side in ("chosen", "rejected")]
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    more = [a - b for a, b in zip(*lengths, strict=True)]
    right = sum(m > 0 for m in margins) + 0.5 * sum(m == 0 for m in margins)
    scale = math.sqrt(sum(m * m for m in margins) * sum(d * d for d in more))
    correlation = sum(m * d for m, d in zip(margins, more, strict=True)) / scale if scale else 0.0
    figures = [
        histogram("Rewards", [("chosen", chosen, "a"), ("rejected", rejected, "b")], x_label="reward"),
        histogram(
            "Margins",
            [("margin", margins, "c")],
            x_label="margin",
            note=f"{right / len(pairs):.1%} of {len(pairs)} pairs have the chosen side ahead",
        ),
        scatter(
            "Length against reward",
            [("chosen", lengths[0], chosen, "a"), ("rejected", lengths[1], rejected, "b")],
            x_label="tokens",
            y_label="reward",
        ),
        scatter(
            "What length explains",
            [("pairs", more, margins, "c")],
            x_label="tokens that the chosen side has more",
            y_label="margin",
            note=f"correlation of reward and length within pairs: {correlation:+.2f}",
        ),
    ]
    after = f"<p class='sub'>After {pairs[0]['step']} steps.</p>"
    return after + f"<div class='grid-of'>{''.join(figures)}</div>"


def _samples(run: Run) -> str:
    if not run.samples:
        return ""
    last = max(record["step"] for record in run.samples)
    newest = [record for record in run.samples if record["step"] == last][:MOST_SAMPLES]
    shown = max(1, MOST_OPEN // len(newest))  # of each prompt
    cards = []
    for record in newest:
        rows = zip(record["reference"][:shown], record["policy"][:shown], strict=True)
        two = "".join(
            f"<div class='two'><div><small>before: the reference</small>{escape(before.strip())}</div>"
            f"<div><small>after {last} steps</small>{escape(after.strip())}</div></div>"
            for before, after in rows
        )
        prompt = f"<div class='prompt'><small>prompt</small>{escape(record['prompt'])}</div>"
        cards.append(f"<div class='sample'>{prompt}{two}</div>")
    rest = f"<details><summary>{len(cards) - MOST_OPEN} more</summary>{''.join(cards[MOST_OPEN:])}</details>"
    settings = run.settings
    how = f"temperature {settings.get('sample_temperature')}, at most {settings.get('sample_tokens')} tokens, same seed"
    return f"<p class='sub'>{escape(how)}</p>" + "".join(cards[:MOST_OPEN]) + (rest if len(cards) > MOST_OPEN else "")


def _table(rows: Sequence[tuple[object, ...]]) -> str:
    body = "".join(
        f"<tr><th>{escape(str(first))}</th>{''.join(f'<td>{_cell(value)}</td>' for value in rest)}</tr>"
        for first, *rest in rows
    )
    return f"<div class='wide'><table>{body}</table></div>" if rows else ""


def _cell(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    return escape(f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))


def _data(run: Run) -> str:
    rows: list[tuple[object, ...]] = []
    for name, label in (("train", "training"), ("eval", "held out")):
        if part := run.facts.get("data", {}).get(name):
            counts = f"{part['prompts']:,} prompts, {part['pairs']:,} pairs from {part['rows']:,} rows"
            longest = f"longest prompt {part['longest_prompt']}, completion {part['longest_completion']} tokens"
            dropped = "; ".join(f"{reason} {what}" for reason, what in part["dropped"].items())
            rows.append((label, part["source"], part["format"], counts, longest, f"dropped: {dropped or 'none'}"))
    return _table(rows)


def _settings(run: Run) -> str:
    defaults = defaults_of(TrainConfig)
    changed = [(name, value) for name, value in run.settings.items() if defaults.get(name, ...) != value]
    rest = [(name, value) for name, value in run.settings.items() if defaults.get(name, ...) == value]
    return _table(changed) + f"<details><summary>{len(rest)} at their defaults</summary>{_table(rest)}</details>"


def _machine(run: Run) -> str:
    rows: list[tuple[object, ...]] = []
    for name, value in run.facts.get("device", {}).items():
        if name.endswith("_bytes"):
            rows += [] if "free" in name or value is None else [(name[:-6], f"{value / 2**30:.1f} GiB")]
        else:
            rows.append((name, value))
    return _table([*rows, *run.facts.get("versions", {}).items()])
