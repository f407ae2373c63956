"""What README shows works: its Python runs here, its shell commands are those that .ci/run calls, its links exist, and
so do the flags and files that it names."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.cli import COMMANDS
from dpo.config import flag_of
from tests.train.toy import write_model

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("dpo", "kernels", "bench"))]
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
OTHER_PROGRAMS = {
    *("--standalone", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"),  # torchrun
    *("--nodes", "--ntasks-per-node", "--gpus-per-node"),  # Slurm
    *("--check", "--benchmark-only"),  # ruff, pytest-benchmark
}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """One command a line, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines if line.strip()]


def names_of_a_training_script(folder: Path) -> dict[str, Any]:
    """What a loop that the snippets are pasted into has at hand: padded pairs, chosen first, then rejected."""
    torch.manual_seed(0)
    input_ids = torch.randint(2, 258, (4, 9))
    labels = input_ids.clone()
    for row, (start, stop) in enumerate([(3, 9), (4, 7), (3, 8), (4, 9)]):
        labels[row, :start] = labels[row, stop:] = -100
    return {
        "torch": torch,
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
        "input_ids": input_ids,
        "labels": labels,
        "ref_logps": torch.tensor([-31.0, -17.0, -29.0, -26.0]),
        "pi_logps": torch.tensor([-30.0, -18.0, -29.5, -27.0], requires_grad=True),
        "yw_idxs": torch.tensor([0, 1]),
        "yl_idxs": torch.tensor([2, 3]),
    }


def needs_trl(block: str) -> bool:
    return "from trl" in block


@pytest.mark.parametrize("path", READMES[::2], ids=lambda path: path.parent.name)
def test_the_python_of_the_readmes_runs(tmp_path, path):
    folder = write_model(tmp_path / "model")
    found = [block for block in blocks(path.read_text(), "python") if not needs_trl(block)]
    assert found
    losses, pairs = [], []
    names = names_of_a_training_script(folder)
    for block in found:
        names["model"] = AutoModelForCausalLM.from_pretrained(folder)  # a block may have prepared it for packed rows
        exec(compile(block, str(path), "exec"), names)
        losses += [names.pop("loss")] if "loss" in names else []
        pairs += [(names.pop("losses"), names.pop("rewards"))] if "losses" in names else []
    # what a drop-in replaces computes the same
    assert all(torch.allclose(loss, losses[0], rtol=1e-5) for loss in losses)
    for a, b in pairs:
        torch.testing.assert_close((a, b), pairs[0], rtol=1e-6, atol=1e-6)
    if path == READMES[0]:
        assert len(losses) == 3
        assert len(pairs) == 2
        assert names["logps"].requires_grad
        assert names["logps"].shape == (2,)
        assert names["lm_head"].grad is not None


@pytest.mark.peers
@pytest.mark.parametrize("path", READMES[::2], ids=lambda path: path.parent.name)
def test_the_python_of_the_readmes_with_trl_runs(tmp_path, path):
    trl = pytest.importorskip("trl", reason="the peers extra is not installed")
    names = names_of_a_training_script(write_model(tmp_path / "model"))
    options = {"max_steps": 2, "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no"}
    names["args"] = trl.DPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, **options)
    rows = [{"prompt": "2 + 2 =", "chosen": " four", "rejected": " fish"}] * 4
    names["pairs"] = Dataset.from_list(rows)
    found = [block for block in blocks(path.read_text(), "python") if needs_trl(block)]
    assert found
    for block in found:
        exec(compile(block, str(path), "exec"), names)
    trainer = names["trainer"]
    assert isinstance(trainer, trl.DPOTrainer)
    assert type(trainer)._compute_loss.__module__ == "dpo_kernels.trl_hook"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_ci_calls_the_shell_commands_of_the_readmes(path):
    ci = {" ".join(line.split()) for line in (ROOT / ".ci" / "run").read_text().replace("\\\n", " ").splitlines()}
    shown = [command for block in blocks(path.read_text(), "sh") for command in commands(block)]
    assert shown or path != READMES[0]
    for command in shown:
        assert command in ci, command


def headings(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        assert (path.parent / file).exists(), target
        assert not anchor or anchor in headings(path.parent / file if file else path), target


def known_flags() -> set[str]:
    """Every flag of `dpo`, both ways, and those of the benchmarks' commands."""
    fields = {field.name for config in COMMANDS.values() for field in dataclasses.fields(config)}
    found = {"--help", "--version"} | {flag_of(name) for name in fields} | {flag_of(f"no_{name}") for name in fields}
    for path in (ROOT / "bench").rglob("*.py"):
        source = path.read_text()
        found |= set(re.findall(r"\"(--[a-z0-9-]+)\"", source))
        found |= set(map(flag_of, re.findall(r"^    (\w+): ", source, re.MULTILINE)))  # fields of their settings
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_are_named_exist(path):
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]", path.read_text()))
    assert named <= known_flags() | OTHER_PROGRAMS, sorted(named - known_flags() - OTHER_PROGRAMS)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_files_that_are_named_exist(path):
    folders = [ROOT / name for name in ("dpo", "kernels", "bench", "tests")] if path.parent == ROOT else [path.parent]
    for name in set(re.findall(r"`([\w/.-]+\.(?:py|css|js|toml))`", path.read_text())):
        assert (ROOT / name).exists() or any(any(folder.rglob(name)) for folder in folders), name


def test_no_section_stands_twice():
    for path in DOCUMENTS:
        titles = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
        assert len(titles) == len(set(titles)), path
