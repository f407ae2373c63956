"""`dpo report`: the page holds what the run holds, loads nothing, and renders."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from dpo.charts import ticks
from dpo.cli import main
from dpo.metrics import read_json_lines
from tests.train.toy import write_model
from tests.watch.runs import longer, train, write_rows

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
LOADING = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"}
VOID = {"meta", "br", "img", "link"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with everything in it: warnings, held-out pairs, samples, and markup where texts are."""
    folder = tmp_path_factory.mktemp("runs")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", longer)
    write_rows(folder / "held_out.jsonl", longer, 9, seed=1)
    (folder / "prompts.txt").write_text("".join(f"<script>alert({k})</script> & 'so' \"on\"\n" for k in range(8)))
    return train(
        folder / "model",
        folder / "pairs.jsonl",
        folder / "a <run>",
        *("--eval-data", str(folder / "held_out.jsonl"), "--eval-every", "4", "--max-steps", "12", "--log-to", "none"),
        *("--sample-prompts", str(folder / "prompts.txt"), "--sample-tokens", "5", "--lr", "1e-3"),
    )


@pytest.fixture(scope="module")
def page(run) -> str:
    main(["report", str(run)])
    return (run / "report.html").read_text()


class Page(HTMLParser):
    """Checks that tags close in order; keeps attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_no_address_leaves_the_page(page):
    found = Page(page)
    for tag, name, value in found.attributes:
        assert name not in ("src", "href", "srcset", "action", "data", "poster", "xlink:href", "background"), (
            tag,
            value,
        )
        assert not name.startswith("on"), (tag, name)
    assert not re.search(r"url\s*\(|@import", page)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|EventSource|sendBeacon|import)\s*\(", page)
    assert set(re.findall(r"https?://[^\"'<> ]*", page)) <= {"http://www.w3.org/2000/svg"}
    (policy,) = (v for tag, name, v in found.attributes if tag == "meta" and name == "content" and "default-src" in v)
    assert policy.startswith("default-src 'none'")


def test_texts_of_the_run_stay_texts(page):
    assert "<script>alert" not in page
    assert page.count("<script>") == 1
    assert "<script>alert(0)</script> & 'so' \"on\"" in Page(page).text
    assert "<h1>a &lt;run&gt;</h1>" in page


def test_the_page_holds_what_the_run_holds(run, page):
    text = Page(page).text
    last = read_json_lines(run / "eval.jsonl")[-1]
    assert f"{last['accuracy']:.3f}" in text
    assert f"{last['kl']:.2f} ± {last['kl_se']:.2f}" in text
    (warning,) = read_json_lines(run / "warnings.jsonl")
    assert f"{warning['message']}." in text
    for title in ("Loss", "Reward accuracy", "Rewards", "Margin", "Gradient norm", "KL to the reference"):
        assert f"<b>{title}</b>" in page
    for title in ("Margins", "Length against reward", "What length explains"):
        assert f"<b>{title}</b>" in page
    samples = [r for r in read_json_lines(run / "samples.jsonl") if r["step"] == 12]
    for record in samples:
        for side in ("policy", "reference"):
            assert " ".join(record[side][0].split()) in text
        assert "2 more" in text
    assert "max_steps 12" in text
    assert "torch" in text


def test_pairs_are_those_of_the_last_evaluation(run, page):
    pairs, last = read_json_lines(run / "eval_pairs.jsonl"), read_json_lines(run / "eval.jsonl")[-1]
    rows = [json.loads(line) for line in (run.parent / "held_out.jsonl").read_text().splitlines()]
    assert [p["row"] for p in pairs] == list(range(1, 10))
    assert {p["step"] for p in pairs} == {12}
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("chosen", "rejected"):
            assert pair[f"{side}_tokens"] == len(row[side]) + 1  # bytes, and the end
    for side in ("chosen", "rejected"):
        assert sum(p[f"{side}_reward"] for p in pairs) / 9 == pytest.approx(last[f"{side}_reward"], abs=1e-4)
    circles = re.findall(r"<b>Length against reward</b>.*?</svg>", page)[0].count("<circle")
    assert circles == 18
    heights = re.findall(r"<b>Margins</b>.*?</svg>", page)[0]
    assert sum(int(n) for n in re.findall(r": (\d+)</title>", heights)) == 9
    margins, more = ([p[f"chosen_{k}"] - p[f"rejected_{k}"] for p in pairs] for k in ("reward", "tokens"))
    scale = math.sqrt(sum(m * m for m in margins) * sum(d * d for d in more))
    value = sum(m * d for m, d in zip(margins, more, strict=True)) / scale
    assert f"within pairs: {value:+.2f}" in page
    assert value == pytest.approx(last["length_correlation"], abs=1e-3)


@pytest.mark.parametrize(
    "flags",
    [
        ("--token-budget", "60"),
        ("--two-phase",),
        ("--loss", "simpo"),
        ("--comparisons", "ranking"),
        ("--no-merge-prompts",),
    ],
    ids=" ".join,
)
def test_pairs_are_those_of_the_evaluation_however_it_is_computed(run, tmp_path, flags):
    rows = [{"prompt": f"{k} ", "completions": ["aaaa", "bb" * k, "c" * 9], "scores": [2, 1, 0]} for k in range(1, 8)]
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "--eval-data", str(tmp_path / "scored.jsonl"), "--log-to", "none"
    out = train(
        run.parent / "model", tmp_path / "scored.jsonl", tmp_path / "out", *data, "--eval-split", "train[:5]", *flags
    )
    pairs, last = read_json_lines(out / "eval_pairs.jsonl"), read_json_lines(out / "eval.jsonl")[-1]
    assert len(pairs) == 15
    for side in ("chosen", "rejected"):
        assert sum(p[f"{side}_reward"] for p in pairs) / 15 == pytest.approx(last[f"{side}_reward"], abs=1e-4)
        assert sum(p[f"{side}_tokens"] for p in pairs) / 15 == pytest.approx(last[f"{side}_tokens"])
    assert [p["row"] for p in pairs] == [k for k in range(1, 6) for _ in range(3)]
    assert sorted(p["chosen_tokens"] for p in pairs if p["row"] == 2) == [5, 5, 5]


def test_lines_are_drawn_where_the_numbers_are(run, page):
    steps = read_json_lines(run / "metrics.jsonl")
    svg = re.findall(r"<b>Loss</b>.*?</svg>", page)[0]
    faint = re.findall(r'<polyline class="a faint" points="([^"]*)"', svg)[0]
    points = [tuple(map(float, p.split(","))) for p in faint.split()]
    assert len(points) == len(steps)
    x = [r["step"] for r in steps]
    for (px, _), k in zip(points, x, strict=True):
        assert px == pytest.approx(52 + (k - x[0]) / 12 * (460 - 66), abs=0.06)  # evaluations reach to step 12
    order = sorted(range(len(steps)), key=lambda k: steps[k]["loss"])
    assert [points[k][1] for k in order] == sorted((y for _, y in points), reverse=True)


def test_a_run_without_held_out_data_or_steps_has_a_page_too(run, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(run, bare, ignore=shutil.ignore_patterns("model", "eval*", "samples*", "warnings*", "facts*"))
    main(["report", str(bare), "--output", str(tmp_path / "page.html")])
    text = Page((tmp_path / "page.html").read_text()).text
    assert "no held-out data" in text
    assert "No sign of trouble" in text
    (bare / "metrics.jsonl").write_text("")
    main(["report", str(bare)])
    assert "no step yet" in (bare / "report.html").read_text()


def test_skipped_updates_are_on_the_page(run, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("model"))
    records = read_json_lines(copy / "metrics.jsonl")
    records[3] |= {"skipped": True, "loss": None, "margin": None, "grad_norm": None}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    main(["report", str(copy)])
    assert "not finite at steps 3." in Page((copy / "report.html").read_text()).text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3e-7, 2e-7), (0.6931, 0.6932), (-1234, 98765), (5, 5.0001)])
def test_ticks_are_few_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in found)


@pytest.mark.parametrize("content", [None, "config", "facts"])
def test_folders_that_are_no_run_get_one_line(run, tmp_path, capsys, content):
    folder = tmp_path / "run"
    folder.mkdir()
    if content:
        shutil.copytree(run, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model"))
        name = {"config": "config.yaml", "facts": "facts.json"}[content]
        (folder / name).write_text("[1, 2")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "expected" in error
    assert error.count("\n") == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here (Debian: apt-get install chromium, or CHROMIUM=path)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_in_a_browser_without_a_request(run, page, tmp_path, scheme):
    """The browser draws every figure with a size, logs no error and asks for nothing but the file."""
    probe = (
        "<script>addEventListener('load', () => { const boxes = [...document.querySelectorAll('svg')].map(s => "
        "s.getBoundingClientRect()); const asked = performance.getEntriesByType('resource').length; const seen = "
        "getComputedStyle(document.body).backgroundColor; const out = document.createElement('pre'); out.id = 'probe';"
        "out.textContent = JSON.stringify({svgs: boxes.length, drawn: boxes.filter(b => b.width > 200 && b.height > "
        "100).length, asked, seen, overflow: document.documentElement.scrollWidth - innerWidth}); "
        "document.body.append(out); });</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.replace("</body>", probe))
    picture = run.parent / f"report-{scheme}.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}", "--window-size=1280,3600"]
    flags += [f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--virtual-time-budget=4000"]
    flags += ["--enable-logging=stderr", "--log-level=0", "--host-resolver-rules=MAP * ~NOTFOUND"]
    assert CHROMIUM is not None
    done = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    seen = json.loads(re.findall(r'<pre id="probe">(.*?)</pre>', done.stdout)[0])
    assert seen["svgs"] == seen["drawn"] == page.count("<svg ")
    assert seen["asked"] == 0
    assert seen["overflow"] <= 0
    dark = sum(map(int, re.findall(r"\d+", seen["seen"])[:3])) < 200
    assert dark == (scheme == "dark")
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line and "rror" in line]
    subprocess.run(
        [CHROMIUM, *flags, f"--screenshot={picture}", (run / "report.html").as_uri()],
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert picture.stat().st_size > 50_000
