"""What README shows works: its Python runs here, its shell commands are those that .ci/run calls, its links exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.train.toy import write_model

ROOT = Path(__file__).parent.parent
READMES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in ("dpo", "kernels", "bench"))]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(block: str) -> list[str]:
    """One command a line, without comments and with continued lines joined."""
    lines = block.replace("\\\n", " ").splitlines()
    return [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines if line.strip()]


def test_the_python_of_the_readme_runs(tmp_path):
    folder = write_model(tmp_path / "model")
    names = {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "tokenizer": AutoTokenizer.from_pretrained(folder),
    }
    found = blocks((ROOT / "README.md").read_text(), "python")
    assert len(found) >= 2
    for block in found:
        exec(compile(block, "README.md", "exec"), names)
    assert names["logps"].shape == (2,)
    assert names["logps"].requires_grad
    assert names["lm_head"].grad is not None


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_ci_calls_the_shell_commands_of_the_readmes(path):
    ci = {" ".join(line.split()) for line in (ROOT / ".ci" / "run").read_text().replace("\\\n", " ").splitlines()}
    shown = [command for block in blocks(path.read_text(), "sh") for command in commands(block)]
    assert shown or path != READMES[0]
    for command in shown:
        assert command in ci, command


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.parent.name)
def test_links_and_pictures_exist(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / target).exists(), target
