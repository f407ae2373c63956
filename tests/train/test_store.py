"""The reference store: whole after any crash, exact in any packing, and never a stale hit."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import dpo.refsetup
import dpo.store
from dpo.cli import main
from dpo.config import TrainConfig
from dpo.fingerprint import FileDigests, model_digest
from dpo.inputs import Policy
from dpo.loss import Objective
from dpo.metrics import read_json_lines
from dpo.model import prepare
from dpo.packing import Group
from dpo.reference import CachedReference, MovingReference
from dpo.refsetup import ReferenceSource
from dpo.steps import StepPlan, build_step
from dpo.store import ReferenceStore, token_keys
from tests.train.faults import Disk
from tests.train.toy import random_groups, toy_config, write_model, write_toy

CPU = torch.device("cpu")
OBJECTIVE = Objective()
PLAN = StepPlan(token_budget=60)
GROUPS = random_groups(12)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = LlamaForCausalLM(toy_config()).eval()
    prepare(model, "shared")
    return model


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(dpo.store, "UNIT_TOKENS", 50)


def _fill(root: Path, network, plan: StepPlan = PLAN) -> tuple[ReferenceStore, CachedReference]:
    store = ReferenceStore(root, {"model": "toy"})
    held = CachedReference(store, GROUPS)
    steps = (build_step(GROUPS, range(i, i + 3), plan) for i in range(0, len(GROUPS), 3))
    held.fill(network, steps, OBJECTIVE, CPU)
    return store, held


def _all(held: CachedReference) -> torch.Tensor:
    return held(build_step(GROUPS, range(len(GROUPS)), replace(PLAN, token_budget=10_000)).all_bins[0])


def test_keys_tell_prompts_completions_and_their_border_apart():
    groups = [Group(prompt, [completion], []) for prompt, completion in (([1, 2], [3]), ([1], [2, 3]), ([2, 1], [3]))]
    assert len({token_keys(group)[0] for group in groups}) == 3
    assert token_keys(Group([1, 2], [[4], [3]], []))[1] == token_keys(groups[0])[0]


def test_what_is_stored_serves_any_packing_and_process(network, tmp_path, small_units):
    first = CachedReference()
    other = replace(PLAN, token_budget=200, layout="packed")
    first.fill(network, (build_step(GROUPS, [i], PLAN) for i in range(len(GROUPS))), OBJECTIVE, CPU)
    store, held = _fill(tmp_path, network)
    assert len(list(store.folder.glob("*.safetensors"))) > 2
    torch.testing.assert_close(_all(held), _all(first), rtol=0, atol=1e-5)
    again, refilled = _fill(tmp_path, torch.nn.Module(), other)  # a model that could not compute anything
    assert torch.equal(_all(refilled), _all(held))
    assert len(again) == len(store) == sum(len(group.completions) for group in GROUPS)
    step = build_step(GROUPS, range(len(GROUPS)), other)
    bins = {key: part for b in step.all_bins for key, part in zip(b.members, [refilled(b)], strict=False)}
    assert bins
    assert len(ReferenceStore(tmp_path, {"model": "another"})) == 0


def test_a_crash_at_any_write_fsync_or_rename_of_the_store_costs_nothing(network, tmp_path, small_units):
    (tmp_path / "whole").mkdir()
    whole = torch.empty(0)
    with Disk(tmp_path / "whole") as disk:
        whole = _all(_fill(tmp_path / "whole", network)[1])
    assert sum(event.startswith("save") for event in disk.events) > 2
    computed = set()
    for at in range(len(disk.events)):
        root = tmp_path / str(at)
        root.mkdir()
        with Disk(root, at) as dying:
            _fill(root, network)
        assert dying.dead
        computed.add(len(ReferenceStore(root, {"model": "toy"})))
        store, held = _fill(root, network)
        assert torch.equal(_all(held), whole), disk.events[at]
        assert len(store) == sum(len(group.completions) for group in GROUPS)
    assert len(computed) > 3


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "pickle", "rename", "lengths", "names"])
def test_a_damaged_or_foreign_unit_is_not_used(network, tmp_path, small_units, capsys, damage):
    store, held = _fill(tmp_path, network)
    whole = _all(held)
    path = sorted(store.folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage in ("lengths", "names"):
        tensors = load_file(path)
        tensors = {k: v.clone() for k, v in tensors.items()} | {"lengths": tensors["lengths"] + 1}
        path.unlink()
        save_file(tensors if damage == "lengths" else {"other": torch.ones(2)}, path)
    elif damage == "rename":
        path.rename(path.with_stem("0" * 32))
    else:
        path.write_bytes({"cut": content[:-9], "empty": b"", "pickle": pickle.dumps(content)}[damage])
    again, refilled = _fill(tmp_path, network)
    assert "not a whole unit of log-probs" in capsys.readouterr().out
    assert torch.equal(_all(refilled), whole)
    assert all(torch.isfinite(again[key]).all() for group in GROUPS for key in token_keys(group))


def test_digests_of_files_are_remembered_and_never_stale(tmp_path, monkeypatch):
    folder, memory = write_model(tmp_path / "model"), tmp_path / "digests.json"
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(dpo.fingerprint, "_SETTLED_SECONDS", -1.0)  # as if the files had been there for long
    first = model_digest(str(folder), FileDigests(memory))
    reads = []
    monkeypatch.setattr(dpo.fingerprint.hashlib, "file_digest", lambda *a: reads.append(a) or 1 / 0)
    assert model_digest(str(folder), FileDigests(memory)) == first
    assert not reads
    monkeypatch.undo()
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1e9, 1e9))  # same path, same size, same time of modification
    changed = model_digest(str(folder), FileDigests(memory))
    assert changed != first
    found = {first, changed}
    settings = json.loads((folder / "config.json").read_text())
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    others = {"rope_parameters": linear, "sliding_window": 8, "final_logit_softcapping": 30.0, "logit_scale": 0.5}
    others["quantization_config"] = {"load_in_4bit": True}
    for name, value in others.items():
        (folder / "config.json").write_text(json.dumps(settings | {name: value}))
        found.add(model_digest(str(folder), FileDigests(memory)))
    assert len(found) == 2 + len(others)
    memory.write_text("[]")
    model_digest(str(folder), FileDigests(memory))


def test_a_base_of_four_bits_is_another_reference(tmp_path):
    write_model(tmp_path / "model")
    settings = TrainConfig(model=str(tmp_path / "model"), data="x", lora_r=2, reference_cache=str(tmp_path / "store"))
    policy = Policy(LlamaForCausalLM(toy_config()), None, CPU)
    found = [
        ReferenceSource(replace(settings, load_in_4bit=four_bits), policy, OBJECTIVE, untrained=True).identity()
        for four_bits in (False, True)
    ]
    assert found[0] != found[1]


def test_a_young_file_is_not_remembered(tmp_path):
    folder = write_model(tmp_path / "model")
    model_digest(str(folder), FileDigests(tmp_path / "digests.json"))
    assert not (tmp_path / "digests.json").exists()


def test_an_adapter_brings_its_base_model_in(tmp_path):
    base = write_model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 4}))
    save_file({"lora": torch.ones(2)}, adapter / "adapter_model.safetensors")
    found = {model_digest(str(adapter), FileDigests())}
    save_file({"lora": torch.zeros(2)}, adapter / "adapter_model.safetensors")
    found.add(model_digest(str(adapter), FileDigests()))
    write_model(base, seed=1)
    found.add(model_digest(str(adapter), FileDigests()))
    assert len(found) == 3


# from the command line


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_toy(tmp_path_factory.mktemp("toy"), pairs=12, held_out=3)


def _words(toy: Path, tmp_path: Path, *flags: str, command: str = "train") -> list[str]:
    words = [command, "--model", str(toy / "model"), "--data", str(toy / "pairs.jsonl"), *flags]
    words += ["--eval-data", str(toy / "held_out.jsonl"), "--pairs-per-step", "4", "--no-check-sharing"]
    return [*words, "--reference-cache", str(tmp_path / "store")]


def _train(toy: Path, tmp_path: Path, name: str, *flags: str) -> list[dict]:
    output = "--output", str(tmp_path / name), "--lr", "1e-3", "--warmup-steps", "1"
    main(_words(toy, tmp_path, *output, *flags))
    return read_json_lines(tmp_path / name / "metrics.jsonl")


@pytest.fixture
def no_model(monkeypatch):
    """Makes a run fail that computes log-probs of a reference."""

    def forbid() -> None:
        monkeypatch.setattr(dpo.refsetup.ReferenceSource, "model", lambda self: pytest.fail("reference computed"))

    return forbid


def test_cache_fills_what_train_needs_and_other_runs_use_it(toy, tmp_path, no_model, capsys):
    main(_words(toy, tmp_path, command="cache"))
    out = capsys.readouterr().out
    assert "30 completions computed, 30 in" in out
    main(_words(toy, tmp_path, command="cache"))
    assert "0 completions computed, 30 in" in capsys.readouterr().out
    no_model()
    first = _train(toy, tmp_path, "a")
    assert first[0]["margin"] == 0.0
    assert read_json_lines(tmp_path / "a" / "eval.jsonl")[0]["margin"] == 0.0
    online = _train(toy, tmp_path, "b", "--reference", "online")
    assert [r["margin"] for r in online] == pytest.approx([r["margin"] for r in first], abs=1e-6)
    other = _train(toy, tmp_path, "c", "--token-budget", "70", "--seed", "3", "--no-share-prefix")
    assert other[0]["margin"] == pytest.approx(0.0, abs=1e-6)


def test_a_reference_with_an_adapter_is_computed_with_it(toy, tmp_path, no_model):
    pytest.importorskip("peft")
    _train(toy, tmp_path, "lora", "--lora-r", "2", "--lr", "1e-1")
    adapter = str(tmp_path / "lora" / "model")
    named = [
        [r["margin"] for r in _train(toy, tmp_path, kind, "--reference-model", adapter, "--reference", kind)]
        for kind in ("cached", "online")
    ]
    assert abs(named[0][0]) > 1e-3
    assert named[0] == pytest.approx(named[1], abs=1e-5)
    main(_words(toy, tmp_path, "--adapter", adapter, command="cache"))
    no_model()
    again = _train(toy, tmp_path, "again", "--adapter", adapter)
    assert again[0]["margin"] == 0.0


def test_another_model_data_or_arithmetic_never_hits(toy, tmp_path):
    def stores() -> dict[str, int]:
        return {folder.name: len(list(folder.glob("*.safetensors"))) for folder in (tmp_path / "store").glob("*/")}

    _train(toy, tmp_path, "a")
    assert list(stores().values()) == [2]
    for flags in (("--dtype", "bf16"), ("--reference-model", str(write_model(tmp_path / "other", seed=3)))):
        before = len(stores())
        _train(toy, tmp_path, f"run-{before}", *flags)
        assert len(stores()) == before + 1
    model = tmp_path / "changed"
    shutil.copytree(toy / "model", model)
    weights = {k: v * 1.5 for k, v in load_file(model / "model.safetensors").items()}
    status = (model / "model.safetensors").stat()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    os.utime(model / "model.safetensors", ns=(status.st_atime_ns, status.st_mtime_ns))
    changed = _train(toy, tmp_path, "changed-run", "--model", str(model))
    assert changed[0]["margin"] == 0.0
    assert len(stores()) == 4
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["g"], vocabulary["b"] = vocabulary["b"], vocabulary["g"]
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    again = _train(toy, tmp_path, "tokenizer-run", "--model", str(model))
    assert again[0]["margin"] == 0.0
    assert again[0]["chosen_logps_per_token"] != changed[0]["chosen_logps_per_token"]
    assert sorted(stores().values()) == [2, 2, 2, 4]


@pytest.mark.parametrize("where", ["/proc/store", "full"])
def test_a_store_that_cannot_be_written_is_named(toy, tmp_path, capsys, where):
    (tmp_path / "full").mkdir()
    root = where if where != "full" else str(tmp_path / "full")
    disk = Disk(tmp_path / "full", 4, full=True)
    with disk, pytest.raises(SystemExit) as stop:
        main([*_words(toy, tmp_path, "--output", str(tmp_path / "run"))[:-1], root])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dpo: --reference-cache {root}")
    assert error.count("\n") == 1


def test_a_reference_that_follows_the_policy(toy, tmp_path, network):
    with torch.no_grad():
        policy, reference = LlamaForCausalLM(toy_config()).double(), LlamaForCausalLM(toy_config()).double()
        before = {name: p.clone() for name, p in reference.named_parameters()}
    moving = MovingReference(reference, OBJECTIVE, policy, every=3, mix=0.25)
    moving.after_update(2)
    assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
    moving.after_update(3)
    for name, p in policy.named_parameters():
        expected = 0.25 * p + 0.75 * before[name]
        torch.testing.assert_close(reference.get_parameter(name), expected, rtol=1e-15, atol=1e-15)

    moved = "--reference", "online", "--ref-update-every", "1", "--max-steps", "3"
    copied = _train(toy, tmp_path, "copied", *moved, "--ref-mix", "1", "--eval-every", "1", "--save-every", "2")
    assert [r["margin"] for r in copied] == [0.0] * 3
    held_out = [r["margin"] for r in read_json_lines(tmp_path / "copied" / "eval.jsonl")]
    assert held_out[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(held_out[-1]) > 1e-4
    mixed = _train(toy, tmp_path, "mixed", *moved, "--ref-mix", "0.3", "--save-every", "2")
    assert abs(mixed[2]["margin"]) > 1e-6
    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "mixed", resumed)
    (resumed / "finished.json").unlink()
    again = _train(toy, tmp_path, "resumed", *moved, "--ref-mix", "0.3", "--save-every", "2", "--resume", "must")
    assert [r["margin"] for r in again] == [r["margin"] for r in mixed]
    ours, theirs = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("mixed", "resumed"))
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_loss_without_reference_makes_no_store(toy, tmp_path):
    _train(toy, tmp_path, "run", "--loss", "simpo", "--max-steps", "1")
    assert len(read_json_lines(tmp_path / "run" / "eval.jsonl")) == 2
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ref-update-every", "2"), "--ref-update-every: expected --reference online, found cached"),
        (("--ref-mix", "0.5"), "--ref-mix: expected --ref-update-every beside it"),
        (
            ("--reference", "online", "--ref-update-every", "0"),
            "--ref-update-every: expected a positive number",
        ),
        (
            ("--reference", "online", "--ref-update-every", "2", "--ref-mix", "2"),
            "--ref-mix: expected 0 < value <= 1",
        ),
    ],
    ids=" ".join,
)
def test_references_that_make_no_sense_are_refused(toy, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main(_words(toy, tmp_path, "--output", str(tmp_path / "run"), *flags))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
