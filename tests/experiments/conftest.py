"""The scripts in experiments/ are no package: they are loaded from their files."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "experiments"
BENCHMARKS = FOLDER / "benchmarks"


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Name -> the script as a module; scripts import each other by name, as when they are run."""
    sys.path.extend(str(folder) for folder in (FOLDER, BENCHMARKS) if str(folder) not in sys.path)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # its dataclasses look themselves up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def load_benchmark(load_script: Callable[[str], ModuleType]) -> Callable[[str], ModuleType]:
    """Name -> the script in benchmarks/ as a module."""
    return lambda name: load_script(f"{BENCHMARKS.name}/{name}")
