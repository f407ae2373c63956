"""The model card and --push-to-hub, against a hub that is a stub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from huggingface_hub import ModelCard

from dpo.metrics import read_json_lines
from tests.train.toy import write_model
from tests.watch.runs import even, longer, train, write_rows


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("secret-place")
    write_model(folder / "model")
    write_rows(folder / "pairs.jsonl", longer)
    write_rows(folder / "held_out.jsonl", even, 5, seed=1)
    return folder


def go(toy, output, *flags) -> Path:
    held_out = "--eval-data", str(toy / "held_out.jsonl")
    return train(toy / "model", toy / "pairs.jsonl", output, *held_out, "--log-to", "none", *flags)


class Hub:
    """Stands for HfApi: keeps what it is asked."""

    calls: list[tuple] = []  # noqa: RUF012
    refuses = False

    def create_repo(self, repo_id, *, private, exist_ok):
        if self.refuses:
            raise ConnectionError("403 Forbidden:\nno rights")
        self.calls.append(("create", repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, {path.name for path in Path(folder_path).iterdir()}))


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    Hub.calls, Hub.refuses = [], False
    return Hub


def test_every_model_has_a_card_with_its_settings_data_and_metrics(toy, tmp_path):
    run = go(toy, tmp_path / "run", "--max-steps", "12", "--beta", "0.2")
    text = (run / "model" / "README.md").read_text()
    metadata = ModelCard(text).data.to_dict()
    assert metadata["library_name"] == "transformers"
    assert "dpo" in metadata["tags"]
    assert "base_model" not in metadata  # it is no hub id
    last = read_json_lines(run / "eval.jsonl")[-1]
    row = re.search(r"\| reward accuracy \| 0.5 \| ([\d.]+) \|", text)
    assert row is not None
    assert float(row[1]) == pytest.approx(last["accuracy"], rel=1e-3)
    assert "| `beta` | `0.2` |" in text
    assert "grad_clip 10.0" in text
    assert re.search(r"\| training \| pairs.jsonl \| .* \| 32 \| 32 \|", text)
    assert re.search(r"\| held out \| held_out.jsonl \| .* \| 5 \| 5 \|", text)
    (warning,) = read_json_lines(run / "warnings.jsonl")
    assert warning["message"] in text
    assert "torch" in text
    assert (run / "model" / "curves.png").exists()
    assert "secret-place" not in text
    assert str(tmp_path) not in text


def test_nothing_is_pushed_unasked(toy, tmp_path, hub):
    go(toy, tmp_path / "run", "--max-steps", "1")
    assert hub.calls == []


@pytest.mark.parametrize("private", [True, False])
def test_a_push_takes_the_model_its_tokenizer_and_its_card(toy, tmp_path, hub, capsys, private):
    flags = ("--hub-private",) if private else ()
    run = go(toy, tmp_path / "run", "--max-steps", "1", "--push-to-hub", "me/tiny", *flags)
    create, (what, repo, files) = hub.calls
    assert create == ("create", "me/tiny", private, True)
    assert (what, repo) == ("upload", "me/tiny")
    assert files == {path.name for path in (run / "model").iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= files
    assert 'model="me/tiny"' in (run / "model" / "README.md").read_text()
    assert "pushed to https://huggingface.co/me/tiny" in capsys.readouterr().out


def fails(capsys, toy, output, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        go(toy, output, "--max-steps", "1", *flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_would_fail_after_training_fails_before_it(toy, tmp_path, hub, monkeypatch, capsys):
    error = fails(capsys, toy, tmp_path / "a", "--push-to-hub", "a/b/c")
    assert "--push-to-hub a/b/c: expected NAMESPACE/NAME" in error
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert "expected a token (hf auth login, or HF_TOKEN)" in fails(capsys, toy, tmp_path / "b", "--push-to-hub", "a/b")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE=1" in fails(capsys, toy, tmp_path / "c", "--push-to-hub", "a/b")
    error = fails(capsys, toy, tmp_path / "d", "--hub-private")
    assert "--hub-private: expected --push-to-hub beside it" in error
    assert not list(tmp_path.iterdir())


def test_a_hub_that_refuses_leaves_the_model_where_it_is(toy, tmp_path, hub, capsys):
    hub.refuses = True
    error = fails(capsys, toy, tmp_path / "run", "--push-to-hub", "me/tiny")
    assert "the upload failed: 403 Forbidden: no rights" in error
    assert str(tmp_path / "run" / "model") in error
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_hub_ids_become_metadata_and_odd_names_do_not_break_it(toy, tmp_path):
    from dpo.hub import card
    from dpo.report import read_run

    run = go(toy, tmp_path / "run", "--max-steps", "1")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    for base, kept in (("org/model", True), ("a: b\n- c", True), ("/home/me/model", False), ("./x", False)):
        (run / "config.yaml").write_text(yaml.safe_dump(settings | {"model": base, "data": "org/data"}))
        text = card(read_run(run))
        metadata = yaml.safe_load(text.split("---")[1])
        assert metadata.get("base_model") == (base if kept else None)
        assert metadata["datasets"] == ["org/data"]
        assert "/home/me" not in text
