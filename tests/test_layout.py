"""The shape of the project: who may import whom, and what must not be there."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def module_name(path: Path) -> str:
    top = ROOT / "kernels" if (ROOT / "kernels") in path.parents else ROOT
    return ".".join(path.relative_to(top).with_suffix("").parts)


def imports(path: Path, *, anywhere: bool = True) -> set[str]:
    """What a file imports, anywhere in it or at its top, in absolute form: modules, and names that may be modules."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path).split(".")[: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def test_kernels_is_a_folder_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or "dpo_kernels" not in str(spec.origin)


def test_dpo_kernels_stands_alone():
    for path in (ROOT / "kernels" / "dpo_kernels").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"dpo", "transformers", "datasets", "liger_kernel", "cut_cross_entropy"}, path


def test_dpo_kernels_loads_nothing_of_the_trainer():
    """In a process of its own, as a trainer of somebody else's imports it."""
    code = "import sys, dpo_kernels; print({name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'dpo_kernels'" in loaded
    assert not {name for name in ("dpo", "transformers", "datasets", "tyro") if f"'{name}'" in loaded}


def test_setup_only_points_to_pyproject():
    body = [node for node in ast.parse((ROOT / "setup.py").read_text()).body if not isinstance(node, ast.ImportFrom)]
    assert [ast.unparse(node) for node in body[1:]] == ["setup()"]  # after the docstring


@pytest.mark.parametrize(("folder", "anywhere"), [("dpo", True), ("kernels/dpo_kernels", False)])
def test_imports_go_one_way(folder, anywhere):
    """Of dpo_kernels at the top only: its operators load the implementation that they dispatch to when called."""
    files = {module_name(path): path for path in (ROOT / folder).rglob("*.py") if path.stem != "__init__"}
    uses = {name: imports(path, anywhere=anywhere) & files.keys() - {name} for name, path in files.items()}
    done: set[str] = set()
    while ready := {name for name in uses.keys() - done if uses[name] <= done}:
        done |= ready
    assert done == files.keys(), f"cycle among {sorted(files.keys() - done)}"


@pytest.mark.parametrize("package", ["dpo", "kernels/dpo_kernels"])
def test_peers_are_never_imported_at_the_top(package):
    for path in (ROOT / package).rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {name.split(".")[0] for name in names} & {"trl", "liger_kernel", "cut_cross_entropy"}, path


def test_pytest_benchmarks_and_library_do_not_import_tests():
    for folder in ("dpo", "kernels", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(name.split(".")[0] == "tests" for name in imports(path)), path


def test_help_breaks_lines_where_they_are_meant_to_break():
    """`--help` keeps the line breaks of a setting's docstring: lines that fill a terminal would break twice."""
    for name in ("settings", "lossflags", "commands"):
        for owner in ast.parse((ROOT / "dpo" / f"{name}.py").read_text()).body:
            if not (isinstance(owner, ast.ClassDef) and owner.name.endswith(("Flags", "Config"))):
                continue
            texts = [ast.literal_eval(node.value) for node in owner.body if isinstance(node, ast.Expr)]
            for text in texts[1:]:  # the first is the class's
                lines = [line.strip() for line in text.splitlines()]
                assert len(lines) == 1 or all(len(line) <= 70 for line in lines), text
