"""Profiling: which subnets are measured, what is fitted, and how predictions are checked later."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from scipy.stats import spearmanr

import nas
from hardware_profiles import features, load_device
from hardware_profiles.command import CommandSettings
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
    """Stands for the machine: true latencies times a factor for each call, and a noise for each architecture."""

    def __init__(
        self,
        factors: Sequence[float] = (1.0,),
        noise: float = 0.0,
        runtime: str = "onnxruntime 0",
        calls_before_it_stops: int = 10**6,
        calls_of_others: int = 0,
    ) -> None:
        self.calls: list[list[Architecture]] = []
        self.factors, self.noise, self.runtime = list(factors), noise, runtime
        self.calls_before_it_stops, self.calls_of_others = calls_before_it_stops, calls_of_others

    def __call__(
        self, space: SearchSpace, architectures: Sequence[Architecture], device: Any, **_: Any
    ) -> Mapping[str, Measurement]:
        if len(self.calls) == self.calls_before_it_stops:
            raise KeyboardInterrupt
        factor = self.factors[len(self.calls) % len(self.factors)]
        self.calls.append(list(architectures))
        return {a.id: self.measurement(a, factor * true_ms(space, a)) for a in architectures}

    def measurement(self, architecture: Architecture, latency_ms: float) -> Measurement:
        rng = np.random.default_rng(int(architecture.id, 16))
        date = f"2026-01-01T00:00:{self.calls_of_others + len(self.calls):02d}"  # another one for each process
        made = tiny.measurement(latency_ms * float(np.exp(rng.normal(0, self.noise))))
        return replace(made, provenance=replace(made.provenance, runtime=self.runtime, date=date))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    made = Bench()
    monkeypatch.setattr(module, "measure_untrained", made)
    return made


def test_a_shipped_model_needs_no_measurement(bench: Bench) -> None:
    device = nas.profile(tiny.space(), load_device("stm32f746"))
    assert device.predictor is None and not bench.calls


def test_a_live_device_is_fitted_on_extremes_and_a_spread(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    space = tiny.space()
    device = nas.profile(space, load_device("host-cpu"), seed=3)
    assert all(len(call) <= 12 for call in bench.calls)  # each in a process of its own
    measured = [a for call in bench.calls for a in call]  # the bench has no noise: the first look is enough
    assert len(measured) == len(set(measured)) and 48 <= len(measured) <= 52
    ends = {space.with_precision(end, p) for end in (space.smallest, space.largest) for p in ("fp32", "int8")}
    assert ends <= set(measured)
    fresh = [space.sample(np.random.default_rng(i)) for i in range(40)]
    predicted = [device.figure(space.lower(a), "latency_ms").value for a in fresh]
    assert predicted == pytest.approx([true_ms(space, a) for a in fresh], rel=0.02)
    provenance = device.predictor.provenance  # type: ignore[union-attr]
    assert provenance["runtime"] == "onnxruntime 0" and provenance["anchor_ms"] == 0.1
    assert provenance["architectures"] == [a.id for a in measured] and provenance["history"] == []
    again, other = Bench(), Bench()
    for made, seed in ((again, 3), (other, 4)):
        monkeypatch.setattr(module, "measure_untrained", made)
        nas.profile(space, load_device("host-cpu"), seed=seed)
    assert again.calls == bench.calls != other.calls


def test_what_one_process_measured_is_left_out_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow and fast processes in turn: other subnets of the same process would give its factor away."""
    space = tiny.space()
    turns = Bench(factors=(0.9, 1.1))
    monkeypatch.setattr(module, "measure_untrained", turns)
    device = nas.profile(space, load_device("host-cpu"), samples=48)
    report = device.predictor.report()  # type: ignore[union-attr]
    assert report["folds"] == len(turns.calls) == 5


def test_it_measures_on_until_the_error_or_the_samples_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    space = tiny.space()
    noisy = Bench(noise=0.05)
    monkeypatch.setattr(module, "measure_untrained", noisy)
    device = nas.profile(space, load_device("host-cpu"), samples=70, error=0.0)
    batches = [len(call) for call in noisy.calls]
    assert batches[:4] == [12] * 4 and 70 - 48 <= sum(batches[4:]) <= 70 - 48 + 4
    measured = [a for call in noisy.calls for a in call]
    assert len(set(measured)) == len(measured)
    report = device.predictor.report()  # type: ignore[union-attr]
    assert report["networks"] == len(measured)
    assert 57 <= report["judged_on"] <= 63  # the picked ones tell nothing of the others
    history = device.predictor.provenance["history"]  # type: ignore[union-attr]
    assert {count for count, _ in history} < set(np.cumsum(batches).tolist()) and 48 <= history[0][0] <= 52
    reachable = Bench(noise=0.05)
    monkeypatch.setattr(module, "measure_untrained", reachable)
    nas.profile(space, load_device("host-cpu"), samples=70, error=max(error for _, error in history))
    assert len(reachable.calls) < len(noisy.calls)


def test_what_is_measured_next_rests_on_each_network_over_its_own_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sums of features, which tell networks apart: over measured latencies, and over predicted ones."""
    space, noisy = tiny.space(), Bench(noise=0.05)
    asked: list[tuple[np.ndarray, np.ndarray, list[Architecture]]] = []
    monkeypatch.setattr(module, "measure_untrained", noisy)
    monkeypatch.setattr(module, "this_machine", lambda: SimpleNamespace(channel_block=4))

    def chosen(known: np.ndarray, ahead: np.ndarray, count: int) -> list[int]:
        asked.append((known, ahead, [a for call in noisy.calls for a in call]))
        return list(range(count))

    monkeypatch.setattr(module, "most_uncertain", chosen)
    device = nas.profile(space, load_device("host-cpu"), samples=84, error=0.0)
    assert device.predictor.model.channel_block == 4  # type: ignore[union-attr]
    assert len(asked) >= 3  # from the second on, picked ones are among the known
    for known, ahead, measured in asked:
        sums = [sum(features(space.lower(a), 4).values()) for a in measured]
        latency_ms = [noisy.measurement(a, true_ms(space, a)).latency_ms for a in measured]
        assert sorted(known.sum(axis=1)) == pytest.approx(sorted(np.divide(sums, latency_ms)))
        assert np.median(ahead.sum(axis=1)) == pytest.approx(np.median(known.sum(axis=1)), rel=0.5)


def test_a_profile_that_was_stopped_goes_on_from_its_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    space, record = tiny.space(), tmp_path / "host-cpu.measured.json"
    settings: dict[str, Any] = {"samples": 72, "error": 0.0, "record": record}
    whole = Bench(noise=0.05)
    monkeypatch.setattr(module, "measure_untrained", whole)
    expected = nas.profile(space, load_device("host-cpu"), **settings)
    record.unlink()

    stopped = Bench(noise=0.05, calls_before_it_stops=2)
    monkeypatch.setattr(module, "measure_untrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        nas.profile(space, load_device("host-cpu"), **settings)
    again = Bench(noise=0.05, calls_of_others=2)
    monkeypatch.setattr(module, "measure_untrained", again)
    assert nas.profile(space, load_device("host-cpu"), **settings).key == expected.key
    assert stopped.calls[:2] + again.calls == whole.calls
    assert nas.profile(space, load_device("host-cpu"), **settings).key == expected.key
    assert stopped.calls[:2] + again.calls == whole.calls  # all is known


def test_what_was_measured_otherwise_or_of_another_space_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    space, record = tiny.space(), tmp_path / "record.json"
    settings: dict[str, Any] = {"samples": 60, "error": 0.0, "record": record}
    first, second = Bench(), Bench(runtime="onnxruntime 1")
    monkeypatch.setattr(module, "measure_untrained", first)
    nas.profile(space, load_device("host-cpu"), **{**settings, "samples": 48})
    monkeypatch.setattr(module, "measure_untrained", second)
    device = nas.profile(space, load_device("host-cpu"), **settings)
    assert "earlier measurements were made otherwise" in caplog.text
    assert {a for call in second.calls for a in call} >= set(first.calls[0])
    assert device.predictor.provenance["runtime"] == "onnxruntime 1"  # type: ignore[union-attr]
    other = Bench()
    monkeypatch.setattr(module, "measure_untrained", other)
    nas.profile(tiny.space(kernels=(3, 5)), load_device("host-cpu"), **{**settings, "samples": 48})
    assert sum(map(len, other.calls)) >= 48
    record.write_text('{"schema": "of something else"}')
    with pytest.raises(ValueError, match="is not a record of measurements"):
        nas.profile(space, load_device("host-cpu"), **settings)


def test_a_live_device_measures_networks_that_run_whole(bench: Bench) -> None:
    space = tiny.space(patches=(1, 2))
    made = nas.profile(space, load_device("host-cpu"), samples=60, seed=1)
    check_predictor(space, made, samples=8, seed=2)
    assert {architecture["patches"] for call in bench.calls for architecture in call} == {1}
    assert all(len(set(call)) == len(call) for call in bench.calls)


def test_ten_samples_are_enough_with_the_help_of_known_devices(bench: Bench, tmp_path: Path) -> None:
    space, record = tiny.space(), tmp_path / "record.json"
    device = nas.profile(space, load_device("host-cpu"), samples=10, seed=3, record=record)
    (measured,) = bench.calls
    assert len(set(measured)) == 10
    assert device.predictor is not None
    report = device.predictor.report()
    assert report["networks"] == 10 and {"stm32h743", "adreno540", "typical"} <= set(report["sources"])
    fresh = [space.sample(np.random.default_rng(i)) for i in range(60)]
    predicted = [device.figure(space.lower(a), "latency_ms").value for a in fresh]
    true = [true_ms(space, a) for a in fresh]
    assert spearmanr(predicted, true).statistic > 0.95
    assert np.median(np.abs(np.array(predicted) / true - 1)) < 0.05
    assert device.key != ProfiledDevice(load_device("host-cpu")).key
    nas.profile(space, load_device("host-cpu"), samples=10, seed=3, record=record)
    assert len(bench.calls) == 1  # all is in the record
    wider = tiny.space(stem_width=2 * tiny.SPACE["stem_width"])  # the same texts mean other networks there
    nas.profile(wider, load_device("host-cpu"), samples=10, seed=3, record=record)
    assert len(bench.calls) == 2 and len(bench.calls[1]) == 10


def test_a_shipped_device_does_not_help_to_learn_itself() -> None:
    every = {known.name for known in module.known_devices(load_device("host-cpu"))}
    assert {"stm32h743", "adreno540"} <= every
    assert {known.name for known in module.known_devices(load_device("stm32h743"))} == every - {"stm32h743"}


def test_all_of_a_space_is_measured_where_it_has_no_more_than_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer are drawn than there are: the others are picked."""
    small = tiny.space(
        depths=(1,), expansions=(1,), strides=(1,), widths=(8,), precisions=("int8",), width_multipliers=(0.5, 1, 2, 4)
    )
    noisy = Bench(noise=0.05)
    monkeypatch.setattr(module, "measure_untrained", noisy)
    nas.profile(small, load_device("host-cpu"), samples=50, error=0.0)
    assert len(noisy.calls[0]) == 12 and {a for call in noisy.calls for a in call} == set(small.all())


def test_too_few_samples_are_refused(bench: Bench) -> None:
    with pytest.raises(ValueError, match="3 samples are too few"):
        nas.profile(tiny.space(), load_device("host-cpu"), samples=3)
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


def test_the_channels_of_this_machine_are_not_those_of_another_device(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "this_machine", lambda: SimpleNamespace(channel_block=64))
    here = load_device("host-cpu")
    elsewhere = replace(here.latency_model, this_machine=False, command=CommandSettings("bench {model}"))
    for device, is_here in ((here, True), (replace(here, name="board", latency_model=elsewhere), False)):
        predictor = nas.profile(tiny.space(), device, samples=48).predictor
        assert predictor is not None
        assert (predictor.report()["channel_block"] == 64) == is_here
