"""The public names of the package: all there, sorted, and not hidden by the modules of the same name."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nas

SOURCE = Path(nas.__file__)


def test_names_are_sorted_and_lead_somewhere() -> None:
    assert list(nas.__all__) == sorted(nas.__all__) and len(set(nas.__all__)) == len(nas.__all__)
    for name in nas.__all__:
        assert not isinstance(getattr(nas, name), ModuleType), name
    assert set(nas.__all__) <= set(dir(nas))


def test_type_checkers_and_readers_see_the_same_names() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    imported = {
        alias.name: statement.module
        for node in guarded
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert set(imported) == set(nas.__all__)
    for name, home in imported.items():
        assert getattr(importlib.import_module(str(home)), name) is getattr(nas, name)


def test_a_module_does_not_hide_the_function_of_its_name() -> None:
    for name in ("profile", "search", "export", "train", "remeasure", "quantize", "trust"):
        assert isinstance(importlib.import_module(f"nas.{name}"), ModuleType)
        assert callable(getattr(nas, name))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(nas, "seach")


def test_the_package_itself_imports_nothing_heavy() -> None:
    code = "import sys, nas, nas.cli; print(*{'torch', 'optuna', 'pandas', 'onnx', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=SOURCE.parents[1], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
