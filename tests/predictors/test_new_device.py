"""A new device learned from ten measurements: it is a mixture of known ones, or like none of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hardware_profiles import AdditiveModel, UnsupportedLayer, features
from predictors import KnownDevice, LatencyPredictor, NewDevicePredictor, NotFitted, choose_samples, load_predictor
from predictors.new_device import source_latencies, usable
from search_spaces import CompactTransformer, MobileNet, Network, SearchSpace

SPACE = MobileNet(resolutions=(8, 16), widths=(8, 16), depths=(1, 2, 3), squeeze_excite=(False, True))
AFTER = SPACE.lower(SPACE.largest)


def pool(space: SearchSpace = SPACE, count: int = 120) -> list[Network]:
    rng = np.random.default_rng(0)
    return [space.lower(space.sample(rng)) for _ in range(count)]


def devices(networks: list[Network], count: int = 6) -> list[KnownDevice]:
    """Made-up devices with prices of their own; some have a single precision."""
    names = sorted({name for network in networks for name in features(network)})
    rng = np.random.default_rng(1)
    typical = {"count": 2e-3, "macs": 1e-7, "bytes": 1e-7, "weight_bytes": 1e-7}
    found = []
    for number in range(count):
        prices = {name: typical[name.rpartition(".")[2]] * float(rng.lognormal(0, 0.8)) for name in names}
        found.append(KnownDevice(f"d{number}", AdditiveModel(prices, 0.01), ("", "fp32", "int8")[number % 3]))
    return found


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    return pool()


@pytest.fixture(scope="module")
def known(networks: list[Network]) -> list[KnownDevice]:
    every = [SPACE.lower(SPACE.with_precision(SPACE.largest, one)) for one in ("fp32", "int8")]
    return devices([*networks, *every])


def new_device(known: list[KnownDevice], networks: list[Network]) -> np.ndarray:
    """Twice as slow as a mixture of two known ones, with 2 % noise."""
    rows = source_latencies(known[:2], networks)
    return 2 * np.sqrt(rows[:, 0] * rows[:, 1]) * np.exp(np.random.default_rng(2).normal(0, 0.02, len(rows)))


@pytest.fixture(scope="module")
def fitted(known: list[KnownDevice], networks: list[Network]) -> NewDevicePredictor:
    chosen = choose_samples(source_latencies(known, networks), 10, 0)
    latency_ms = new_device(known, networks)[chosen]
    return NewDevicePredictor().fit(networks, chosen, latency_ms, known, {"device": "new"})


def test_ten_measurements_place_it_among_the_known_ones(
    fitted: NewDevicePredictor, known: list[KnownDevice], networks: list[Network]
) -> None:
    true = new_device(known, networks)
    found = fitted.predict(networks)
    error = np.abs(np.array([one.mean_ms for one in found]) / true - 1)
    assert np.median(error) < 0.04 and (error < 0.1).mean() > 0.9
    inside = [one.low_ms <= y <= one.high_ms for one, y in zip(found, true, strict=True) if one.low_ms and one.high_ms]
    assert np.mean(inside) > 0.8
    report = fitted.report()
    assert report["networks"] == 10 and report["median_error"] < report["macs_only"]["median_error"]
    assert set(report["sources"]) == {*(device.name for device in known), "macs", "bytes", "kernels"}


def test_a_known_device_of_one_precision_is_asked_as_if_in_that(known: list[KnownDevice]) -> None:
    """Against lowering the architecture with every precision replaced."""
    rng = np.random.default_rng(3)
    for device in known[1:3]:
        for _ in range(10):
            architecture = SPACE.sample(rng)
            asked = SPACE.lower(SPACE.with_precision(architecture, device.precision))
            (row,) = source_latencies([device], [SPACE.lower(architecture)])
            assert row[0] == pytest.approx(device.model.latency_ms(asked))


def test_the_amounts_are_those_of_the_network(networks: list[Network]) -> None:
    macs, bytes_, kernels = source_latencies([], networks[:1])[0]
    assert macs == pytest.approx(networks[0].macs)
    counted = features(networks[0])
    assert kernels == pytest.approx(sum(v for k, v in counted.items() if k.endswith(".count")))
    assert bytes_ == pytest.approx(sum(v for k, v in counted.items() if k.endswith("bytes")))


@pytest.mark.parametrize("patches", [(1,), (1, 2)])
def test_its_table_predicts_codes_as_it_predicts_networks(patches: tuple[int, ...]) -> None:
    space = MobileNet(resolutions=(16,), widths=(8, 16), depths=(1, 2), patches=patches)
    networks = pool(space, 80)
    known = devices([*networks, *(space.lower(space.with_precision(space.largest, p)) for p in ("fp32", "int8"))])
    chosen = choose_samples(source_latencies(known, networks), 10, 0)
    predictor = NewDevicePredictor().fit(networks, chosen, new_device(known, networks)[chosen], known)
    rng = np.random.default_rng(4)
    codes = np.stack([rng.integers(len(choice.options), size=60) for choice in space.choices], axis=1)
    single = predictor.predict([space.lower(space.from_codes(row)) for row in codes])
    together = predictor.table(space).predict(codes)
    assert together.mean_ms.tolist() == pytest.approx([one.mean_ms for one in single])
    assert together.high_ms is not None
    assert together.high_ms.tolist() == pytest.approx([one.high_ms for one in single])


def test_a_layer_that_no_known_device_has_is_refused_or_infinite(
    fitted: NewDevicePredictor, networks: list[Network], known: list[KnownDevice]
) -> None:
    space = CompactTransformer(resolutions=(16,), embeddings=(16,), depths=(1,), head_size=8)
    with pytest.raises(UnsupportedLayer):
        fitted.predict([space.lower(space.largest)])
    assert np.isinf(fitted.table(space).predict(space.encode([space.largest])).mean_ms).all()
    foreign = [space.lower(space.largest)]
    assert usable(known, networks) == known and usable(known, foreign) == []


def test_it_reads_back_what_it_saved(fitted: NewDevicePredictor, networks: list[Network], tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    fitted.save(path)
    loaded = load_predictor(path)
    assert isinstance(loaded, NewDevicePredictor)
    assert loaded.predict(networks[:5]) == fitted.predict(networks[:5])
    assert loaded.report() == fitted.report() and loaded.provenance == {"device": "new"}
    document = json.loads(path.read_text())
    for changed, told in (
        ({"version": 7}, "version 7"),
        ({"known": [{"name": "a"}]}, "damaged"),
        ({"transferred": {}}, "damaged"),
    ):
        path.write_text(json.dumps(document | changed))
        with pytest.raises(ValueError, match=told):
            load_predictor(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a saved latency predictor"):
        load_predictor(path)
    path.write_text("not json")
    with pytest.raises(ValueError, match="is not JSON"):
        load_predictor(path)
    with pytest.raises(NotFitted):
        NewDevicePredictor().predict(networks)


def test_load_predictor_reads_the_other_kind_too(
    networks: list[Network], known: list[KnownDevice], tmp_path: Path
) -> None:
    path = tmp_path / "own.json"
    LatencyPredictor().fit(networks, new_device(known, networks)).save(path)
    assert isinstance(load_predictor(path), LatencyPredictor)
