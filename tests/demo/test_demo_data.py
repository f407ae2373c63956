"""The embedded preference pairs, and the script that makes them."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter

import pytest

from bench.data import make_demo_data
from bench.data.make_demo_data import PROMPTS, build_pairs, clean, normalised, unique_sentences
from dpo.demo.run import load_pairs


def sentences(*splits: str) -> Counter[str]:
    pairs = load_pairs()
    return Counter(normalised(row[side]) for split in splits for row in pairs[split] for side in ("chosen", "rejected"))


def test_counts_and_fields():
    pairs = load_pairs()
    assert {split: len(rows) for split, rows in pairs.items()} == {"train": 1200, "held-out": 288}
    rows = [row for split in pairs.values() for row in split]
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)
    assert Counter(row["prompt"] for row in pairs["held-out"]) == dict.fromkeys(PROMPTS.values(), 96)
    assert Counter(row["prompt"] for row in rows) == dict(zip(PROMPTS.values(), (498, 497, 493), strict=True))


def test_every_sentence_is_clean_and_in_one_pair_only():
    texts = [row[side] for rows in load_pairs().values() for row in rows for side in ("chosen", "rejected")]
    assert all(text == f" {clean(text)}" and len(text) > 1 for text in texts)
    repeated = [text for text, count in Counter(texts).items() if count > 1]
    assert repeated == [" Very disappointing."]  # once about a restaurant, once about a product


def test_no_held_out_sentence_is_in_training():
    held_out, train = sentences("held-out"), sentences("train")
    assert max(held_out.values()) == 1
    assert not held_out.keys() & train.keys()


def rows(label: int | None, *texts: str) -> list[dict[str, object]]:
    return [{"text": text, "class": label} for text in texts]


def test_pairs_are_built_from_distinct_sentences_and_near_duplicates_stay_in_training():
    positive = ["Great phone!", "Great Phone.", "Great Phone.", "Loud and clear. ", "It\x92s  fine\x85", "I like it."]
    negative = ["Broke at once.", "Never again!", "Poor sound.", "Does not fit.", "No."]
    fixtures = {"amazon": rows(1, *positive) + rows(0, *negative) + rows(None, "")}
    pairs = list(build_pairs(fixtures, held_out=2))
    assert pairs == list(build_pairs(fixtures, held_out=2))
    assert {pair["chosen"] for pair in pairs} == {
        " Great phone!",
        " Great Phone.",
        " Loud and clear.",
        " It’s fine…",
        " I like it.",
    }
    assert {pair["rejected"] for pair in pairs} == {f" {text}" for text in negative}
    held_out = [pair for pair in pairs if pair["split"] == "held-out"]
    assert len(held_out) == 2
    assert not any("reat" in pair["chosen"] for pair in held_out)
    assert {pair["prompt"] for pair in pairs} == {"Product review:"}


def test_unique_sentences_keeps_the_order_and_the_label():
    mixed = rows(1, "b", "a") + rows(0, "c") + rows(1, " b ", "  ")
    assert unique_sentences(mixed, 1) == ["b", "a"]
    assert unique_sentences(mixed, 0) == ["c"]


def write_package(path, domains=tuple(PROMPTS)):
    with tarfile.open(path, "w:gz") as tar:
        for domain in domains:
            good = [f"{domain} good {number}" for number in range(100)]
            bad = [f"{domain} bad {number}" for number in range(99)]
            content = json.dumps(rows(1, *good) + rows(0, *bad) + rows(None, "")).encode()
            member = tarfile.TarInfo(f"package/test/fixtures/{domain}.json")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def test_script_from_archive_to_file(tmp_path, monkeypatch, capsys):
    archive, output = tmp_path / "package.tgz", tmp_path / "pairs.jsonl"
    write_package(archive)
    monkeypatch.setattr("sys.argv", ["make_demo_data", "--archive", str(archive), "--output", str(output)])
    with pytest.raises(SystemExit) as stop:
        make_demo_data.run_script(make_demo_data.main)
    assert stop.value.code == 2
    assert "SHA-256" in capsys.readouterr().err
    assert not output.exists()

    monkeypatch.setattr(make_demo_data, "require_sha256", lambda path, expected: None)
    make_demo_data.main()
    made = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(made) == 3 * 99
    assert sum(row["split"] == "held-out" for row in made) == 3 * make_demo_data.HELD_OUT
    assert all(row["chosen"].split()[1:2] == ["good"] and row["rejected"].split()[1:2] == ["bad"] for row in made)
