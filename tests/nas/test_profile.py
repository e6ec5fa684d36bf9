"""Profiling: which subnets are measured, what is fitted, and how predictions are checked later."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from scipy.stats import spearmanr

import nas
from hardware_profiles import load_device
from hardware_profiles.host_cpu import NoisyMachine
from hardware_profiles.measurement import Measurement
from nas.costs import ProfiledDevice
from nas.profile import anchor_record, check_predictor, untrained_model
from search_spaces import Architecture, SearchSpace
from tests.nas import tiny

module = importlib.import_module("nas.profile")


def true_ms(space: SearchSpace, architecture: Architecture) -> float:
    """An additive device: 3 us a layer with weights, and fewer nanoseconds a MAC in int8."""
    layers = space.lower(architecture).layers
    return sum(
        0.003 * layer.has_weights + layer.macs * (1e-6 if layer.precision.name == "fp32" else 4e-7) for layer in layers
    )


class Bench:
    """Stands for the machine: true latencies times a factor for each call."""

    def __init__(self, factors: Sequence[float] = (1.0,)) -> None:
        self.calls: list[list[Architecture]] = []
        self.factors = list(factors)

    def __call__(
        self, space: SearchSpace, architectures: Sequence[Architecture], device: Any, **_: Any
    ) -> Mapping[str, Measurement]:
        factor = self.factors[len(self.calls) % len(self.factors)]
        self.calls.append(list(architectures))
        return {a.id: tiny.measurement(factor * true_ms(space, a)) for a in architectures}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(module, "measure_untrained", made)
    return made


def test_a_shipped_model_needs_no_measurement(bench: Bench) -> None:
    device = nas.profile(tiny.space(), load_device("stm32f746"))
    assert device.predictor is None and not bench.calls


def test_a_live_device_is_fitted_on_extremes_and_a_spread(bench: Bench) -> None:
    space = tiny.space()
    device = nas.profile(space, load_device("host-cpu"), samples=60, seed=3)
    (measured,) = bench.calls
    assert len(measured) == len(set(measured)) and 60 <= len(measured) <= 64
    ends = {space.with_precision(end, p) for end in (space.smallest, space.largest) for p in ("fp32", "int8")}
    assert ends <= set(measured)
    fresh = [space.sample(np.random.default_rng(i)) for i in range(40)]
    predicted = [device.figure(space.lower(a), "latency_ms").value for a in fresh]
    assert predicted == pytest.approx([true_ms(space, a) for a in fresh], rel=0.02)
    provenance = device.predictor.provenance  # type: ignore[union-attr]
    assert provenance["runtime"] == "onnxruntime 0" and provenance["anchor_ms"] == 0.1
    assert provenance["architectures"] == [a.id for a in measured]
    nas.profile(space, load_device("host-cpu"), samples=60, seed=3)
    nas.profile(space, load_device("host-cpu"), samples=60, seed=4)
    assert bench.calls[1] == measured != bench.calls[2]


def test_too_few_samples_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="59 samples are too few"):
        nas.profile(tiny.space(), load_device("host-cpu"), samples=59)
    assert not bench.calls


def test_predictions_are_checked_on_subnets_never_seen(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    space = tiny.space()
    device = nas.profile(space, load_device("host-cpu"), samples=60)
    later = Bench(factors=(1.2, 1.32))
    monkeypatch.setattr(module, "measure_untrained", later)
    check = check_predictor(space, device, samples=20, seed=0)
    first, second = later.calls
    assert first == second and check.networks == len(first) == 20
    assert not {a.id for a in first} & set(device.predictor.provenance["architectures"])  # type: ignore[union-attr]
    assert check.repeat_noise == pytest.approx(0.12 / 1.26)
    measured = [1.26 * true_ms(space, a) for a in first]
    predicted = [device.figure(space.lower(a), "latency_ms").value for a in first]
    errors = np.abs(np.array(predicted) / measured - 1)
    assert check.median_error == pytest.approx(np.median(errors))
    assert check.median_error == pytest.approx(1 - 1 / 1.26, abs=0.02)
    assert check.within_10_percent == pytest.approx((errors <= 0.1).mean())
    assert check.spearman == pytest.approx(spearmanr(predicted, measured)[0])
    assert check.macs_only_median_error > 0.02
    assert [row["measured_ms"] for row in check.rows] == pytest.approx(measured, abs=1e-5)


def test_nothing_to_check_is_an_error(bench: Bench) -> None:
    with pytest.raises(ValueError, match="stm32f746 has no predictor"):
        check_predictor(tiny.space(), ProfiledDevice(load_device("stm32f746")), seed=0)
    small = tiny.space(
        depths=(1,), expansions=(1,), strides=(1,), widths=(8,), precisions=("int8",), width_multipliers=(0.5, 1, 2)
    )
    device = nas.profile(small, load_device("host-cpu"), samples=200)
    with pytest.raises(ValueError, match="never saw"):
        check_predictor(small, device, seed=0)


def test_untrained_models_are_valid_and_in_their_precision() -> None:
    space = tiny.space()
    for precision, wanted in (("fp32", False), ("int8", True)):
        network = space.lower(space.with_precision(space.largest, precision))
        model = onnx.load_from_string(untrained_model(network, seed=0))
        onnx.checker.check_model(model, full_check=True)
        assert any(node.op_type == "DequantizeLinear" for node in model.graph.node) == wanted


def test_the_anchor_record_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert anchor_record() == tmp_path / "fitnest" / "anchor.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert anchor_record() == tmp_path / "home" / ".cache" / "fitnest" / "anchor.json"


def test_this_machine_is_really_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    space = tiny.space()
    ends = [space.smallest, tiny.space(widths=(64, 64), resolutions=(32,)).largest]
    models = {
        "small": untrained_model(space.lower(ends[0]), 0),
        "large": untrained_model(tiny.space(widths=(64, 64), resolutions=(32,)).lower(ends[1]), 0),
    }
    try:
        measured = module.measure(models, load_device("host-cpu"), patience_s=10.0)
    except NoisyMachine as error:
        pytest.skip(f"the machine is too busy to be measured: {error}")
    assert 0 < measured["small"].latency_ms < measured["large"].latency_ms
    assert measured["small"].provenance.device == "host-cpu" and anchor_record().exists()
