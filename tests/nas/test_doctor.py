"""What `nas doctor` says of a machine."""

from __future__ import annotations

import importlib
import platform

import onnxruntime
import pytest
import torch

from nas.doctor import doctor
from nas.versions import PACKAGES


def test_it_tells_versions_processor_and_what_can_be_measured() -> None:
    facts, problems = doctor()
    assert facts["python"] == platform.python_version()
    assert facts["torch"] == torch.__version__ and facts["onnxruntime"] == onnxruntime.__version__
    assert facts["int8 weights"].startswith(("-63..63", "-127..127"))
    assert {"host-cpu", "stm32f746", "adreno540"} <= set(facts["devices"].split(", "))
    assert int(facts["usable cores"]) >= 1 and int(facts["torch threads"]) >= 1
    assert facts["GPU"] and facts["processor"] and facts["instruction sets"]
    assert all(isinstance(value, str) for value in facts.values())
    assert not [p for p in problems if "fitnest" not in p.split()[0]]


def test_it_names_what_is_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("nas.doctor")
    found = dict.fromkeys(PACKAGES, "1.0") | {"python": "3.11"}
    monkeypatch.setattr(module, "versions", lambda: found | {"pandas": "not installed"})
    assert [p for p in doctor()[1] if p.startswith("pandas is not installed; pip install")]
    monkeypatch.setattr(module, "versions", lambda: found | {"optuna": "4.2.1"})
    assert doctor()[1] == ["optuna 4.2.1 is too old; pip install 'optuna>=5,<6'"]
