"""What `nas doctor` says of a machine."""

from __future__ import annotations

import platform
import re
import tomllib
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nas import doctor as module
from nas.cli import DONE, FAILED, main
from nas.doctor import doctor


def test_it_tells_versions_processor_and_what_can_be_measured() -> None:
    found = doctor()
    facts = found.facts
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__ and facts["onnxruntime"] == onnxruntime.__version__
    assert facts["int8 weights"].startswith(("-63..63", "-127..127"))
    assert {"host-cpu", "stm32f746", "adreno540"} <= set(facts["devices"].split(", "))
    assert int(facts["usable cores"]) >= 1 and int(facts["torch threads"]) >= 1
    assert facts["GPU"] and facts["processor"] and facts["instruction sets"]
    assert all(isinstance(value, str) for value in facts.values())
    assert found.required == []


def test_what_is_required_and_what_is_optional_is_as_declared() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        return {re.split(r"[<>=\[]", one)[0] for one in requirements}

    extras = project["optional-dependencies"]
    assert set(module.REQUIRED) == names(project["dependencies"])
    optional = names([each for extra, listed in extras.items() if extra != "dev" for each in listed])
    assert set(module.OPTIONAL) == set(module.NEEDED_FOR) == optional


def call(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """(exit code, what is missing)"""
    try:
        code = main(["doctor"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    return code, [line for line in capsys.readouterr().out.splitlines() if "missing" in line]


def test_a_missing_extra_is_told_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "OPTIONAL", {"no-such-package": "no_such_module"})
    monkeypatch.setattr(module, "NEEDED_FOR", {"no-such-package": "nothing"})
    said = "missing, optional: no-such-package is not installed; it is for nothing"
    assert call(capsys) == (DONE, [said, "nothing required is missing"])


@pytest.mark.parametrize(
    ("package", "name", "said"),
    [
        ("no-such-package", "no_such_module", "no-such-package is not installed; pip install no-such-package"),
        (
            "numpy",
            "broken_module",
            f"numpy {np.__version__} cannot be imported (OSError: no libgomp); pip install --force-reinstall",
        ),
    ],
)
def test_a_required_package_that_is_missing_or_broken_is_a_failure(
    package: str,
    name: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('no libgomp')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(module, "REQUIRED", {package: name})
    monkeypatch.setattr(module, "OPTIONAL", {})
    code, (line,) = call(capsys)
    assert code == FAILED and line.startswith(f"missing, required: {said}")


def test_an_optuna_that_is_too_old_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version_of", lambda package: "4.2.1")
    assert doctor().required == ["optuna 4.2.1 is too old; pip install --force-reinstall 'optuna>=5,<6'"]
