"""Imports point one way, heavy libraries stay where they belong, and light packages import fast."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = ("search_spaces", "hardware_profiles", "predictors", "nas", "experiments")  # each may import those before it
NAS_ONLY = {"torch", "torchvision", "optuna"}  # and of experiments, whose benchmarks time them
LAZY = {"sklearn", "scipy"}  # imported inside the functions that use them
FILES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, top_level: bool = False) -> Iterator[tuple[int, str]]:
    """(line, top package) of each import; with `top_level`, only of those that run on import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if not node.level:  # a relative one stays in its package
                yield node.lineno, str(node.module).split(".")[0]
        elif not (top_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)) and not is_for_types(node):
            yield from imports(node, top_level)


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    heavy = set() if package in ("nas", "experiments") else NAS_ONLY
    forbidden = {"tests", *({"experiments"} - {package}), *ORDER[ORDER.index(package) + 1 :], *heavy}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    wrong = [f"{name} (line {line})" for line, name in imports(tree) if name in forbidden]
    wrong += [f"{name} at the top (line {line})" for line, name in imports(tree, top_level=True) if name in LAZY]
    assert not wrong, f"{path.relative_to(ROOT)} must not import {', '.join(wrong)}"


@pytest.mark.parametrize("package", ORDER[:3])
def test_light_packages_import_in_half_a_second_and_without_heavy_ones(package: str) -> None:
    if not (ROOT / package / "__init__.py").exists():
        assert not list((ROOT / package).glob("*.py")), f"{package} has modules but no __init__.py"
        pytest.skip(f"the package {package} is not there yet")
    # processor time, so that others at work on the machine do not count
    code = (
        f"import sys, time; start = time.process_time(); import {package}; print(time.process_time() - start);"
        f"print(*sorted({NAS_ONLY | LAZY!r} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
        elapsed, heavy = done.stdout.split("\n")[:2]
        assert not heavy, f"import {package} pulls in {heavy}"
        seconds.append(float(elapsed))
    assert min(seconds) < 0.5, f"import {package} took {min(seconds):.2f} s at best"
