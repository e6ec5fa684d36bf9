"""A new device learned from ten measurements: near a known one, or like none; in fp32 and int8, whichever is faster."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hardware_profiles import AdditiveModel, UnsupportedLayer, features
from predictors import KnownDevice, LatencyPredictor, NewDevicePredictor, NotFitted, choose_networks, load_predictor
from search_spaces import CompactTransformer, MobileNet, Network, SearchSpace

SPACE = MobileNet(resolutions=(8, 16), widths=(8, 16), depths=(1, 2, 3), squeeze_excite=(False, True))


def pool(space: SearchSpace = SPACE, count: int = 120) -> list[Network]:
    rng = np.random.default_rng(0)
    return [space.lower(space.sample(rng)) for _ in range(count)]


def prices(networks: list[Network], seed: int, int8_over_fp32: float = 1.0) -> AdditiveModel:
    """Made-up prices in ms that scatter by half a factor of e around round ones; those of int8 MACs are scaled."""
    names = sorted({name for network in networks for name in features(network)})
    rng = np.random.default_rng(seed)
    round_ms = {"count": 2e-3, "macs": 1e-7, "bytes": 1e-7, "weight_bytes": 3e-8}
    made = {}
    for name in names:
        _, precision, quantity = name.split(".")
        faster = int8_over_fp32 if (precision, quantity) == ("int8", "macs") else 1.0
        made[name] = round_ms[quantity] * faster * float(rng.lognormal(0, 0.5))
    return AdditiveModel(made, 0.01)


def measured(device: AdditiveModel, networks: list[Network], seed: int = 2) -> np.ndarray:
    """With 2 % noise."""
    noise = np.random.default_rng(seed).normal(0, 0.02, len(networks))
    return np.array([device.latency_ms(network) for network in networks]) * np.exp(noise)


@pytest.fixture(scope="module")
def networks() -> list[Network]:
    return pool()


@pytest.fixture(scope="module")
def known(networks: list[Network]) -> list[KnownDevice]:
    return [
        KnownDevice(f"d{number}", prices(networks, 10 + number), ("", "fp32", "int8")[number % 3])
        for number in range(6)
    ]


@pytest.fixture(scope="module")
def fitted(known: list[KnownDevice], networks: list[Network]) -> NewDevicePredictor:
    chosen = choose_networks(networks, 10, 0)
    latency_ms = measured(prices(networks, 1), networks)[chosen]
    return NewDevicePredictor().fit(networks, chosen, latency_ms, known, {"device": "new"})


def errors(predictor: NewDevicePredictor, networks: list[Network], true_ms: np.ndarray) -> np.ndarray:
    return np.abs(np.array([one.mean_ms for one in predictor.predict(networks)]) / true_ms - 1)


@pytest.mark.parametrize("int8_over_fp32", [0.2, 0.5, 2.0, 5.0])
def test_ten_measurements_tell_the_prices_of_precisions_apart(int8_over_fp32: float, networks: list[Network]) -> None:
    device = prices(networks, 1, int8_over_fp32)
    latency_ms = measured(device, networks)
    chosen = choose_networks(networks, 10, 0)
    predictor = NewDevicePredictor().fit(networks, chosen, latency_ms[chosen])
    assert np.median(errors(predictor, networks, latency_ms)) < 0.05
    report = predictor.report()
    assert report["networks"] == 10 and report["median_error"] < report["macs_only"]["median_error"]
    rng = np.random.default_rng(5)
    drawn = [SPACE.sample(rng) for _ in range(40)]
    for precision in ("fp32", "int8"):  # all through, which no sample is likely to be
        whole = [SPACE.lower(SPACE.with_precision(one, precision)) for one in drawn]
        assert np.median(errors(predictor, whole, measured(device, whole))) < 0.15


def test_intervals_hold_for_90_percent(networks: list[Network]) -> None:
    inside = []
    for seed in range(12):
        latency_ms = measured(prices(networks, 20 + seed), networks, seed)
        chosen = choose_networks(networks, 10, seed)
        predictor = NewDevicePredictor().fit(networks, chosen, latency_ms[chosen])
        error = errors(predictor, networks, latency_ms)
        predicted = np.array([one.mean_ms for one in predictor.predict(networks)])
        inside += (error * latency_ms / predicted <= predictor.report()["relative_error_90"]).tolist()
    assert 0.84 < np.mean(inside) < 0.99


def test_a_known_device_at_another_speed_is_recognised(networks: list[Network]) -> None:
    others = [KnownDevice(f"d{number}", prices(networks, 30 + number)) for number in range(5)]
    twin = prices(networks, 40)
    latency_ms = 3.7 * measured(twin, networks)
    chosen = choose_networks(networks, 10, 1)
    with_help, alone = (
        NewDevicePredictor().fit(networks, chosen, latency_ms[chosen], known)
        for known in ([*others, KnownDevice("twin", twin)], [])
    )
    weights = with_help.report()["sources"]
    assert weights["twin"] > 2 * max(weights[other.name] for other in others)
    assert sum(weights.values()) == pytest.approx(1, abs=1e-3)
    assert np.median(errors(with_help, networks, latency_ms)) < np.median(errors(alone, networks, latency_ms))
    assert alone.report()["sources"] == {"typical": 1.0}


def test_a_unit_of_time_changes_nothing(networks: list[Network], known: list[KnownDevice]) -> None:
    chosen = choose_networks(networks, 10, 3)
    latency_ms = measured(prices(networks, 5), networks)[chosen]
    one, thousand = (NewDevicePredictor().fit(networks, chosen, unit * latency_ms, known) for unit in (1.0, 1000.0))
    assert [p.mean_ms for p in thousand.predict(networks[:20])] == pytest.approx(
        [1000 * p.mean_ms for p in one.predict(networks[:20])], rel=1e-4
    )


@pytest.mark.parametrize("patches", [(1,), (1, 2)])
def test_its_table_predicts_codes_as_it_predicts_networks(patches: tuple[int, ...]) -> None:
    space = MobileNet(resolutions=(16,), widths=(8, 16), depths=(1, 2), patches=patches)
    networks = pool(space, 80)
    chosen = choose_networks(networks, 10, 0)
    predictor = NewDevicePredictor().fit(networks, chosen, measured(prices(networks, 1), networks)[chosen])
    rng = np.random.default_rng(4)
    codes = np.stack([rng.integers(len(choice.options), size=60) for choice in space.choices], axis=1)
    single = predictor.predict([space.lower(space.from_codes(row)) for row in codes])
    together = predictor.table(space).predict(codes)
    assert together.mean_ms.tolist() == pytest.approx([one.mean_ms for one in single])
    assert together.high_ms is not None
    assert together.high_ms.tolist() == pytest.approx([one.high_ms for one in single])


def test_what_neither_samples_nor_known_devices_have_is_refused_or_infinite() -> None:
    space = MobileNet(resolutions=(8,), widths=(8, 16), depths=(1, 2))
    networks = pool(space)
    only_fp32 = [space.lower(space.with_precision(space.sample(np.random.default_rng(i)), "fp32")) for i in range(12)]
    everything = [*only_fp32, *networks]
    latency_ms = measured(prices(everything, 1), everything)
    alone = NewDevicePredictor().fit(everything, range(10), latency_ms[:10])
    mixed = [network for network in networks if network.int8_macs_share]
    with pytest.raises(UnsupportedLayer, match="no measurement covers"):
        alone.predict(mixed[:1])
    int8 = space.with_precision(space.largest, "int8")
    assert np.isinf(alone.table(space).predict(space.encode([int8])).mean_ms).all()
    assert np.isfinite(alone.table(space).predict(space.encode([space.with_precision(int8, "fp32")])).mean_ms).all()
    known = [KnownDevice("a", prices(everything, 3))]
    helped = NewDevicePredictor().fit(everything, range(10), latency_ms[:10], known)
    assert np.isfinite([one.mean_ms for one in helped.predict(mixed)]).all()
    foreign = CompactTransformer(resolutions=(16,), embeddings=(16,), depths=(1,), head_size=8)
    with pytest.raises(UnsupportedLayer):
        helped.predict([foreign.lower(foreign.largest)])


def test_it_reads_back_what_it_saved(fitted: NewDevicePredictor, networks: list[Network], tmp_path: Path) -> None:
    path = tmp_path / "new.json"
    fitted.save(path)
    loaded = load_predictor(path)
    assert isinstance(loaded, NewDevicePredictor)
    assert loaded.predict(networks[:5]) == fitted.predict(networks[:5])
    assert loaded.report() == fitted.report() and loaded.provenance == {"device": "new"}
    document = json.loads(path.read_text())
    for changed, told in (
        ({"version": 2}, "version 2, this program reads 3; fit it again"),
        ({"coefficients_ms": [1.0]}, "damaged"),
        ({"relative_error_90": None}, "damaged"),
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


def test_load_predictor_reads_the_other_kind_too(networks: list[Network], tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    LatencyPredictor().fit(networks, measured(prices(networks, 1), networks)).save(path)
    assert isinstance(load_predictor(path), LatencyPredictor)


@pytest.mark.parametrize(
    ("chosen", "latency_ms", "told"),
    [
        ([0, 1, 2], [1.0, 2.0, 3.0], "at least 4 distinct samples"),
        ([0, 1, 2, 2], [1.0, 2.0, 3.0, 3.0], "at least 4 distinct samples"),
        ([0, 1, 2, 500], [1.0, 2.0, 3.0, 4.0], "among networks 0 to 119"),
        ([0, 1, 2, 3], [1.0, 2.0, 3.0], "one latency for each of 4 samples"),
        ([0, 1, 2, 3], [1.0, 2.0, 3.0, 0.0], "positive latencies"),
        ([0.0, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0], "expected the places"),
    ],
)
def test_says_what_is_wrong(chosen: list[int], latency_ms: list[float], told: str, networks: list[Network]) -> None:
    with pytest.raises(ValueError, match=told):
        NewDevicePredictor().fit(networks, chosen, latency_ms)
