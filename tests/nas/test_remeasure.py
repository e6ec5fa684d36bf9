"""Fronts measured anew: on which images, with which noise, and what stays on them."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import nas
from hardware_profiles import load_device
from hardware_profiles.measurement import Measurement
from nas.costs import Figure, Infeasible, ProfiledDevice, at_most, maximize, minimize
from nas.evaluator import Evaluator
from nas.front import Evaluation, ParetoFront
from search_spaces import Architecture
from tests.nas import tiny

module = importlib.import_module("nas.remeasure")
KEY = "latency_ms@host-cpu"


@dataclass
class Bench:
    """Stands for the machine: the time of a model is its size, and repeats by a factor of its own for each."""

    repeats: Mapping[str, float]
    calls: int = 0
    models: Mapping[str, bytes] | None = None

    def __call__(self, models: Mapping[str, bytes], device: Any, **_: Any) -> dict[str, Measurement]:
        self.calls += 1
        self.models = models
        slower = self.calls % 2 == 0
        return {
            name: tiny.measurement(size_ms(model) * (self.repeats.get(name, 1.0) if slower else 1.0))
            for name, model in models.items()
        }


def size_ms(model: bytes) -> float:
    return len(model) / 1e4


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(tiny.supernet(), tiny.data())


@pytest.fixture(scope="module")
def found(evaluator: Evaluator) -> ParetoFront:
    """A search that believed in MACs as latencies."""
    space = evaluator.supernet.space
    rng = np.random.default_rng(0)
    evaluations = []
    for architecture in dict.fromkeys([space.smallest, space.largest, *(space.sample(rng) for _ in range(20))]):
        network = space.lower(architecture)
        figures = {
            "accuracy": Figure.share(tiny.formula(architecture, "val_search"), 48),
            KEY: Figure(network.macs * 1e-6, network.macs * 0.9e-6, network.macs * 1.1e-6, "predicted"),
            "macs": Figure.exact(network.macs),
        }
        evaluations.append(Evaluation(architecture.id, str(architecture), figures, network.precisions))
    return ParetoFront.of(
        evaluations, [maximize("accuracy"), minimize("latency_ms", "host-cpu")], space=space.name, supernet_sha256="x"
    )


@pytest.fixture(scope="module")
def host() -> ProfiledDevice:
    return ProfiledDevice(load_device("host-cpu"))


def test_the_front_is_that_of_held_out_images_and_measured_latencies(
    evaluator: Evaluator, found: ParetoFront, host: ProfiledDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = (*found.points, *found.others)
    bench = Bench({e.id: 1 + 0.002 * i for i, e in enumerate(everything)})
    monkeypatch.setattr(module, "measure", bench)
    front = nas.remeasure(found, evaluator, {"host-cpu": host})
    assert bench.calls == 2 and bench.models is not None and set(bench.models) == {e.id for e in everything}
    differences = [0.002 * i / (1 + 0.001 * i) for i in range(len(everything))]
    assert front.noise == {KEY: pytest.approx(np.quantile(differences, 0.9))}
    noise = front.noise[KEY]
    before = {e.id: e for e in everything}
    for point in (*front.points, *front.others):
        i = list(before).index(point.id)
        mean = size_ms(bench.models[point.id]) * (1 + 0.001 * i)
        latency = point.figures[KEY]
        assert latency.value == pytest.approx(mean) and latency.origin == "measured"
        assert (latency.low, latency.high) == pytest.approx((mean * (1 - noise), mean * (1 + noise)))
        architecture = evaluator.supernet.space.parse(point.architecture)
        assert point["accuracy"] == evaluator.accuracy(architecture, "val_front")
        assert point.figures["accuracy"] == Figure.share(point["accuracy"], len(tiny.data()["val_front"]))
        assert point.predicted == {key: before[point.id].figures[key] for key in ("accuracy", KEY)}
        assert point.figures["macs"] == before[point.id].figures["macs"]
    for a, b in itertools.pairwise(front.points):
        margin = noise * max(a[KEY], b[KEY])
        assert a["accuracy"] != b["accuracy"] or abs(a[KEY] - b[KEY]) > margin
    beaten = {
        p.id
        for p in front.points
        for o in (*front.points, *front.others)
        if o["accuracy"] > p["accuracy"] and o[KEY] * (1 + noise) < p[KEY] * (1 - noise)
    }
    assert not beaten
    assert front.supernet_sha256 == "x" and front.space == found.space
    assert len(front.points) + len(front.others) == len(everything)


def test_what_leaves_the_front_once_measured_is_marked_until_it_comes_back(
    evaluator: Evaluator, found: ParetoFront, host: ProfiledDevice, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "measure", Bench({}))
    searched = {e.id for e in found.points}
    front = nas.remeasure(found, evaluator, {"host-cpu": host})
    on_front = {e.id for e in front.points}
    assert searched - on_front and on_front - searched  # believing in MACs as latencies is wrong both ways
    assert set(front.left) == {e.id for e in front.departed} == searched - on_front
    front.save(tmp_path / "front.json")
    assert ParetoFront.load(tmp_path / "front.json") == front
    slow = max(front.departed, key=lambda e: e[KEY])
    bound = slow[KEY] * 0.999
    assert [e.id for e in front.filter([at_most("latency_ms", bound, "host-cpu")]).departed] == [
        e.id for e in front.departed if e[KEY] <= bound
    ]
    few = nas.remeasure(front, evaluator, {"host-cpu": host}, candidates=2)  # of the others nothing new is known
    assert set(front.left) <= set(few.left) and len(few.left) == len(set(few.left))
    assert not set(few.left) & {e.id for e in few.points}
    unmeasured = {e.id for e in front.points} - {e.id for e in few.points}
    assert unmeasured and not unmeasured & set(few.left)
    came_back = replace(found, left=tuple(e.id for e in (*found.points, *found.others)))
    assert (
        set(nas.remeasure(came_back, evaluator, {"host-cpu": host}).left)
        == {e.id for e in (*found.points, *found.others)} - on_front
    )


def test_models_are_measured_as_they_would_be_deployed(
    evaluator: Evaluator, found: ParetoFront, host: ProfiledDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench({})
    monkeypatch.setattr(module, "measure", bench)
    front = nas.remeasure(found, evaluator, {"host-cpu": host}, candidates=3)
    assert bench.models is not None and len(bench.models) == 3
    for evaluation in (e for e in (*front.points, *front.others) if e.id in bench.models):
        nodes = onnx.load_from_string(bench.models[evaluation.id]).graph.node
        quantized = any(node.op_type == "QuantizeLinear" for node in nodes)
        assert quantized == ("int8" in evaluation.precisions.values())
    assert len(front.points) + len(front.others) == len(found.points) + len(found.others)
    kept = [e for e in front.others if e.id not in bench.models]
    assert all(e.figures[KEY].origin == "predicted" for e in kept)


def test_without_a_live_device_only_accuracy_is_new(found: ParetoFront) -> None:
    space = tiny.space()
    fake = tiny.FakeEvaluator(space)
    fake.supernet = SimpleNamespace(space=space)  # type: ignore[attr-defined]
    everything: Any = (*found.points, *found.others)
    plain = ParetoFront.of(everything, [maximize("accuracy"), minimize("macs")])
    front = nas.remeasure(plain, fake, {})  # type: ignore[arg-type]
    assert front.noise is None
    assert {split for _, split in fake.asked} == {"val_front"}
    for point in front.points:
        architecture: Architecture = space.parse(point.architecture)
        assert point.figures["accuracy"] == Figure.share(tiny.formula(architecture, "val_front"), 10_000)
        assert point.figures[KEY].origin == "predicted"


def test_a_front_that_misses_its_limits_once_measured_is_infeasible(
    evaluator: Evaluator, found: ParetoFront, host: ProfiledDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", Bench({}))
    limited = ParetoFront.of(
        (*found.points, *found.others), found.objectives, limits=[at_most("latency_ms", 0.1, "host-cpu")]
    )
    assert limited.points
    with pytest.raises(Infeasible, match=r"(?s)once measured, .*what binds is latency_ms@host-cpu<=0\.1.*nearest"):
        nas.remeasure(limited, evaluator, {"host-cpu": host}, candidates=2)


def test_of_a_layer_that_is_too_long_some_are_taken_from_end_to_end() -> None:
    points = [
        Evaluation(f"a{i}", f"{i}", {"accuracy": Figure.exact(0.1 * i), "macs": Figure.exact(i)}, {}) for i in range(9)
    ]
    behind = [replace(p, id=f"b{p.id}", figures=p.figures | {"macs": Figure.exact(p["macs"] + 0.5)}) for p in points]
    front = ParetoFront.of([*behind, *points], [maximize("accuracy"), minimize("macs")])
    everything = [*front.points, *front.others]
    assert {e.id for e in module._layers(everything, front, 3)} == {"a0", "a4", "a8"}
    chosen = {e.id for e in module._layers(everything, front, 11)}
    assert {p.id for p in points} < chosen and {"ba0", "ba8"} < chosen and len(chosen) == 11
    assert {e.id for e in module._layers(everything, front, 99)} == {e.id for e in everything}


def test_a_device_that_is_not_at_hand_is_not_measured(
    evaluator: Evaluator, found: ParetoFront, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("was measured"))
    away = ProfiledDevice(tiny.device(tmp_path))
    everything = [
        replace(e, figures={k.replace("host-cpu", "toy"): f for k, f in e.figures.items()})
        for e in (*found.points, *found.others)
    ]
    front = ParetoFront.of(everything, [maximize("accuracy"), minimize("latency_ms", "toy")])
    again = nas.remeasure(front, evaluator, {"toy": away}, candidates=2)
    assert not again.noise and {point.figures["latency_ms@toy"].origin for point in again.points} == {"predicted"}


def test_models_have_the_weights_of_the_evaluator(
    evaluator: Evaluator, found: ParetoFront, host: ProfiledDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half the range where the processor would overflow, of the whole elsewhere: as accuracies were evaluated."""
    given, write = set(), module.write_onnx
    monkeypatch.setattr(module, "measure", Bench({}))
    monkeypatch.setattr(module, "write_onnx", lambda *a, **k: given.add(k.get("weight_limit")) or write(*a, **k))
    for limit in (64, 127):
        given.clear()
        monkeypatch.setattr(evaluator, "weight_limit", limit)
        nas.remeasure(found, evaluator, {"host-cpu": host}, candidates=2)
        assert given == {limit}
