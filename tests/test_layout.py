"""The shape of the project: who may import whom, and what must not be there."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, in absolute form."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module)
    return found


def test_kernels_is_a_folder_and_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or "dpo_kernels" not in str(spec.origin)


def test_dpo_kernels_stands_alone():
    for path in (ROOT / "kernels" / "dpo_kernels").rglob("*.py"):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & {"dpo", "transformers", "datasets", "liger_kernel", "cut_cross_entropy"}, path


def test_dpo_has_no_import_cycles():
    files = {path.stem: path for path in (ROOT / "dpo").glob("*.py") if path.stem != "__init__"}
    uses = {
        name: {module.split(".")[1] for module in imports(path) if module.startswith("dpo.")} & files.keys()
        for name, path in files.items()
    }
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
