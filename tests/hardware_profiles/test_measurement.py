"""Records of measurements: older files still load."""

from __future__ import annotations

import json

import pytest

from hardware_profiles.measurement import Measurement, Provenance

OLD = """{"latency_ms": 1.0, "p50_ms": 1.1, "p95_ms": 1.5, "spread": 0.01, "rounds": 10, "runs_per_round": 20,
"provenance": {"device": "host-cpu", "runtime": "onnxruntime 1.32.0", "threads": 1, "batch": 1, "precision": "fp32",
"cpu": "a cpu", "date": "2026-01-01T00:00:00+00:00", "anchor_ms": 0.1}}"""


def test_a_file_from_before_outliers_were_counted_loads() -> None:
    old = Measurement.from_json(json.loads(OLD))
    assert old.outliers == 0
    assert old.provenance == Provenance(
        *("host-cpu", "onnxruntime 1.32.0", 1, 1, "fp32", "a cpu", "2026-01-01T00:00:00+00:00", 0.1)
    )


def test_what_nobody_knows_is_none_there_and_back() -> None:
    provenance = Provenance("phone", "tflite", 1, 1, "int8", "a phone", "", None)
    unknown = Measurement(1.0, 1.0, 1.0, None, 1, 1, provenance, outliers=3)
    assert Measurement.from_json(json.loads(json.dumps(unknown.to_json()))) == unknown


def test_a_record_without_a_field_that_was_always_there_is_refused() -> None:
    data = json.loads(OLD)
    del data["spread"], data["provenance"]["anchor_ms"]
    with pytest.raises(ValueError, match=r"not a Measurement: missing \['spread'\], unknown \[\]; measure again"):
        Measurement.from_json(data)
    data["spread"] = None
    with pytest.raises(ValueError, match=r"not a Provenance: missing \['anchor_ms'\]"):
        Measurement.from_json(data)
