"""The protocol is tested on scripted times, the rest by measuring two small networks in a real process."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from hardware_profiles import host_cpu
from hardware_profiles.host_cpu import (
    NoisyMachine,
    UnmeasurableModel,
    anchor_model,
    measure_models,
    precision_label,
)
from hardware_profiles.machine import this_machine
from hardware_profiles.measurement import Measurement, Provenance, repeat_noise
from hardware_profiles.onnx_writer import random_ranges, random_weights, write_onnx
from search_spaces import MobileNet, Network
from search_spaces.layers import Port, activation

PROVENANCE = Provenance("host-cpu", "onnxruntime 1.32.0", 1, 1, "fp32", "a cpu", "2026-01-01T00:00:00+00:00", 0.1)
MEASUREMENT = Measurement(1.0, 1.1, 1.5, 0.01, 10, 20, PROVENANCE)


def _model(rng: np.random.Generator, width: float = 0.5, precision: str = "fp32") -> bytes:
    space = MobileNet(resolutions=(8,), channels=1, width_multipliers=(width,), depths=(1,))
    network = space.lower(space.with_precision(space.smallest, precision))
    return write_onnx(network, random_weights(network, rng), random_ranges(network)).SerializeToString()


def _measured(models: dict[str, bytes], record: Path, **options: object) -> dict[str, Measurement]:
    try:
        return measure_models(models, anchor_record=record, **options)  # type: ignore[arg-type]
    except NoisyMachine as error:
        pytest.skip(f"other work on this machine: {error}")


# scripted times ---------------------------------------------------------------------------------------------


class _Clock:
    """Stands for a loaded network: its times come from a list, or are always the same."""

    def __init__(self, *times_ms: float) -> None:
        self.times_ms = list(times_ms)
        self.runs = 4
        self.visits = 0

    def time_ms(self, runs: int) -> np.ndarray:
        self.visits += 1
        return np.full(runs, self.times_ms.pop(0) if len(self.times_ms) > 1 else self.times_ms[0])


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    taken: list[float] = []
    monkeypatch.setattr(host_cpu.time, "sleep", taken.append)
    monkeypatch.setattr(host_cpu, "_say", lambda **event: None)
    return taken


def _scripted(anchor: host_cpu._Anchor, subjects: list[host_cpu._Subject], rounds: int) -> None:
    host_cpu._measure_chunk(subjects, anchor, rounds, lambda: None)


def test_a_quiet_machine_needs_no_more_than_the_rounds_asked_for(pauses: list[float]) -> None:
    models = [_Clock(1.0), _Clock(2.0), _Clock(3.0)]
    subjects = [host_cpu._Subject(str(model), model) for model in models]  # type: ignore[arg-type]
    _scripted(host_cpu._Anchor(_Clock(0.1), 0.1, 10.0), subjects, rounds=5)  # type: ignore[arg-type]
    assert [model.visits for model in models] == [5, 5, 5]
    assert pauses == []


def test_visits_beside_a_slow_anchor_are_dropped_and_repeated(pauses: list[float]) -> None:
    anchor = _Clock(0.1, 0.12, 0.13, 0.109, 0.1, 0.1)  # before; after the first visit; watched twice; after the others
    subject = host_cpu._Subject("a", _Clock(9.0, 2.0, 3.0, 4.0))  # type: ignore[arg-type]
    _scripted(host_cpu._Anchor(anchor, 0.1, 10.0), [subject], rounds=2)  # type: ignore[arg-type]
    assert [float(times[0]) for _, times in subject.accepted(0.11)] == [2.0, 3.0]
    assert pauses == []  # the quiet moment was found by watching


def test_pauses_grow_until_patience_is_out(pauses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_cpu, "WATCH_S", 0.01)
    subject = host_cpu._Subject("a", _Clock(1.0))  # type: ignore[arg-type]
    with pytest.raises(host_cpu._Refused) as refused:
        _scripted(host_cpu._Anchor(_Clock(0.2), 0.1, 60.0), [subject], rounds=2)  # type: ignore[arg-type]
    assert refused.value.anchor_ms == 0.2
    assert subject.visits == []
    assert 30.0 < sum(pauses) <= 60.0
    assert pauses == sorted(pauses)
    assert max(pauses) == host_cpu.LONGEST_PAUSE_S


def test_a_new_best_anchor_disqualifies_what_was_measured_before(pauses: list[float]) -> None:
    anchor = host_cpu._Anchor(_Clock(0.2, 0.2, 0.1, 0.1), np.inf, 10.0)  # type: ignore[arg-type]
    subject = host_cpu._Subject("a", _Clock(5.0, 5.0, 1.0))  # type: ignore[arg-type]
    _scripted(anchor, [subject], rounds=2)  # without a record, the slow phase looks normal
    assert anchor.best_ms == 0.1
    assert [float(times[0]) for _, times in subject.accepted(anchor.limit_ms)] == [1.0, 1.0]


def test_figures_by_hand() -> None:
    rounds = [np.array([1.0, 2.0, 9.0]) + shift for shift in (0.0, 0.1, 0.2, 0.3, 5.0)]  # medians 2.0 .. 2.3, 7.0
    result = host_cpu._figures([(0.1, times) for times in rounds])
    figures = result["figures"]
    assert figures["latency_ms"] == pytest.approx(2.08)  # a fifth of the way through 2.0, 2.1, 2.2, 2.3, 7.0
    assert figures["spread"] == pytest.approx(1.4826 * 0.1 / 2.2)  # deviations 0.2, 0.1, 0, 0.1, 4.8
    assert figures["p50_ms"] == pytest.approx(2.3)
    assert (figures["rounds"], figures["runs_per_round"]) == (5, 3)
    assert result["anchor_ms"] == pytest.approx(0.1)


# a real process ---------------------------------------------------------------------------------------------


def test_measures_in_a_process_of_its_own(tmp_path: Path, rng: np.random.Generator) -> None:
    models = {"../narrow": _model(rng), "wide": _model(rng, 4.0), "int8": _model(rng, 0.5, "int8")}
    record, seen = tmp_path / "deep" / "anchors.json", []
    report: Callable[[int, int], None] = lambda done, total: seen.append((done, total))  # noqa: E731
    result = _measured(models, record, rounds=4, patience_s=30.0, progress=report)
    assert list(result) == list(models)
    assert seen[-1] == (12, 12)
    assert result["wide"].latency_ms > 1.5 * result["../narrow"].latency_ms
    for name, measurement in result.items():
        assert 0.005 < measurement.latency_ms < 50
        assert measurement.p50_ms <= measurement.p95_ms
        assert measurement.rounds >= 4
        assert measurement.runs_per_round >= host_cpu.FEWEST_RUNS
        provenance = measurement.provenance
        assert provenance.precision == ("int8" if name == "int8" else "fp32")
        assert provenance.cpu == this_machine().cpu
        assert provenance.runtime == f"onnxruntime {onnxruntime.__version__}"
        assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement
    [(key, best_ms)] = json.loads(record.read_text())["best_ms"].items()
    assert this_machine().cpu in key
    assert best_ms <= provenance.anchor_ms <= host_cpu.TOLERANCE * best_ms
    assert [path.name for path in record.parent.iterdir()] == ["anchors.json"]


def test_refuses_when_the_anchor_was_once_much_faster(tmp_path: Path, rng: np.random.Generator) -> None:
    record = tmp_path / "anchors.json"
    _measured({"a": _model(rng)}, record, rounds=1, patience_s=30.0)
    written = json.loads(record.read_text())
    [key] = written["best_ms"]
    impossible = written["best_ms"][key] / 3
    record.write_text(json.dumps({"schema": 1, "best_ms": {key: impossible, "another": 7.0}}))
    with pytest.raises(NoisyMachine, match=r"0 of 2 model rounds were accepted .* delete .*anchors\.json"):
        measure_models({"a": _model(rng), "b": _model(rng)}, rounds=1, patience_s=0.5, anchor_record=record)
    assert json.loads(record.read_text())["best_ms"] == {key: impossible, "another": 7.0}


def test_a_model_that_does_not_load_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    record = tmp_path / "anchors.json"
    broken = write_onnx(
        network := Network((4,), (activation("a", Port("input", (4,)), "relu"),)), random_weights(network, rng)
    )
    broken.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(UnmeasurableModel, match=r"'bad'.*NoSuchOperator"):
        measure_models({"good": _model(rng), "bad": broken.SerializeToString()}, anchor_record=record)
    assert not record.exists()


def test_a_killed_process_names_the_model_it_worked_on(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho \'{"model": "heavy"}\'\necho out of memory >&2\nkill -9 $$\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UnmeasurableModel, match="killed by signal 9 while working on model 'heavy': out of memory"):
        measure_models({"heavy": _model(rng)}, anchor_record=tmp_path / "anchors.json")


def test_bad_arguments_and_records_are_refused(tmp_path: Path, rng: np.random.Generator) -> None:
    record = tmp_path / "anchors.json"
    assert measure_models({}, anchor_record=record) == {}
    with pytest.raises(ValueError, match="at least one thread"):
        measure_models({"a": b""}, threads=0, anchor_record=record)
    for text in ("nonsense", '{"schema": 9}', "[]", '{"schema": 1, "best_ms": 3}'):
        record.write_text(text)
        with pytest.raises(ValueError, match=r"anchors\.json is not a record of anchor times .* delete it"):
            measure_models({"a": b""}, anchor_record=record)


def test_the_process_imports_neither_torch_nor_scikit_learn() -> None:
    code = "import sys, hardware_profiles.host_cpu; print(*{'torch', 'sklearn', 'scipy', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=_root())
    assert done.stdout.strip() == ""


def _root() -> Path:
    return Path(host_cpu.__file__).parents[1]


# small things -----------------------------------------------------------------------------------------------


def test_precision_labels(rng: np.random.Generator) -> None:
    space = MobileNet(resolutions=(8,), depths=(1,))
    mixed = space.lower(space.build({**space.smallest.values, "head.precision": "int8"}))
    model = write_onnx(mixed, random_weights(mixed, rng), random_ranges(mixed)).SerializeToString()
    assert precision_label(model) == "mixed"
    assert precision_label(_model(rng)) == "fp32"
    assert precision_label(_model(rng, precision="int8")) == "int8"


def test_the_anchor_is_always_the_same() -> None:
    assert anchor_model() == anchor_model()


def test_repeat_noise_by_hand() -> None:
    first = {name: replace(MEASUREMENT, latency_ms=value) for name, value in {"a": 1.0, "b": 2.0, "c": 3.0}.items()}
    second = {name: replace(MEASUREMENT, latency_ms=value) for name, value in {"a": 1.0, "b": 2.2, "d": 9.0}.items()}
    assert repeat_noise(first, second) == pytest.approx((0.0 + 0.2 / 2.1) / 2)
    with pytest.raises(ValueError, match="no network in common"):
        repeat_noise(first, {})


def test_provenance_key_ignores_the_day_and_the_state_of_the_machine() -> None:
    later = replace(PROVENANCE, date="2027-01-01", anchor_ms=0.2, precision="int8")
    assert later.key == PROVENANCE.key
    assert replace(PROVENANCE, threads=2).key != PROVENANCE.key


def test_a_measurement_without_provenance_is_refused() -> None:
    data = MEASUREMENT.to_json()
    with pytest.raises(ValueError, match=r"missing \['provenance'\]"):
        Measurement.from_json({name: value for name, value in data.items() if name != "provenance"})
    with pytest.raises(ValueError, match=r"not a Provenance: missing \[\], unknown \['color'\]"):
        Measurement.from_json({**data, "provenance": {**data["provenance"], "color": "red"}})
