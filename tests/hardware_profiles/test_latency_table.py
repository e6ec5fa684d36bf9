"""Compiled latencies against those of each network."""

from __future__ import annotations

import time

import numpy as np
import pytest

from hardware_profiles import AdditiveModel, LatencyTable, UnsupportedLayer, features, load_device
from search_spaces import CompactTransformer, MobileNet, SearchSpace

MOBILE = MobileNet(resolutions=(8, 16), widths=(8, 16), depths=(1, 2), squeeze_excite=(False, True))
SPACES = {
    "mobilenet": MOBILE,
    "compact_transformer": CompactTransformer(resolutions=(8, 16), embeddings=(16, 24), depths=(1, 2), head_size=8),
}


def random_codes(space: SearchSpace, count: int) -> np.ndarray:
    rng = np.random.default_rng(count)
    return np.stack([rng.integers(len(choice.options), size=count) for choice in space.choices], axis=1)


def random_model(space: SearchSpace, codes: np.ndarray) -> AdditiveModel:
    rng = np.random.default_rng(3)
    names = sorted({name for row in codes for name in features(space.lower(space.from_codes(row)))})
    return AdditiveModel(dict(zip(names, rng.random(len(names)), strict=True)), 0.25)


@pytest.mark.parametrize("name", SPACES)
def test_each_prediction_is_that_of_the_network(name: str) -> None:
    space = SPACES[name]
    codes = random_codes(space, 80)
    model = random_model(space, codes)
    expected = [model.latency_ms(space.lower(space.from_codes(row))) for row in codes]
    found = LatencyTable(space, model, 0.1).predict(codes)
    np.testing.assert_allclose(found.mean_ms, expected, rtol=1e-12)
    assert found.low_ms is not None
    assert found.high_ms is not None
    np.testing.assert_allclose(found.low_ms, 0.9 * np.array(expected))
    np.testing.assert_allclose(found.high_ms, 1.1 * np.array(expected))
    assert len(set(expected)) > 70


def test_an_unknown_error_gives_no_interval_and_a_large_one_no_negative_latency() -> None:
    codes = random_codes(MOBILE, 5)
    model = random_model(MOBILE, codes)
    unknown = LatencyTable(MOBILE, model).predict(codes)
    assert unknown.low_ms is None
    assert unknown.high_ms is None
    wide = LatencyTable(MOBILE, model, 1.5).predict(codes)
    assert wide.low_ms is not None
    assert (wide.low_ms == 0).all()


def test_what_a_device_cannot_run_or_was_never_measured_is_infinite() -> None:
    codes = random_codes(MOBILE, 60)
    networks = [MOBILE.lower(MOBILE.from_codes(row)) for row in codes]
    full = random_model(MOBILE, codes)
    known = {name: value for name, value in full.coefficients.items() if not name.startswith("hardsigmoid")}
    assert known != full.coefficients
    partial = AdditiveModel(known)
    found = LatencyTable(MOBILE, partial).predict(codes).mean_ms
    for network, latency_ms in zip(networks, found, strict=True):
        if np.isfinite(latency_ms):
            assert latency_ms == pytest.approx(partial.latency_ms(network))
        else:
            with pytest.raises(UnsupportedLayer):
                partial.latency_ms(network)
    assert 0 < np.isfinite(found).sum() < len(found)

    device = load_device("stm32h743")
    legal = LatencyTable(MOBILE, full, is_legal=device.is_legal).predict(codes).mean_ms
    assert np.isinf(legal).tolist() == [bool(device.illegal_layers(network)) for network in networks]
    integers = MOBILE.encode([MOBILE.with_precision(MOBILE.from_codes(row), "int8") for row in codes])
    legal = LatencyTable(MOBILE, full, is_legal=device.is_legal).predict(integers).mean_ms
    assert np.isfinite(legal).any()


def test_what_runs_in_patches_is_predicted_exactly() -> None:
    space = MobileNet(resolutions=(16,), widths=(8, 16), depths=(1, 2), precisions=("int8",), patches=(1, 2, 3))
    codes = random_codes(space, 40)
    networks = [space.lower(space.from_codes(row)) for row in codes]
    assert 0 < sum(bool(network.patch_stage) for network in networks) < 40
    model = random_model(space, codes)
    found = LatencyTable(space, model).predict(codes).mean_ms
    np.testing.assert_allclose(found, [model.latency_ms(network) for network in networks], rtol=1e-12)
    for name, able in (("stm32h743", True), ("stm32h743-xcubeai", False)):
        legal = LatencyTable(space, model, is_legal=load_device(name).is_legal).predict(codes).mean_ms
        assert np.isinf(legal).tolist() == [bool(network.patch_stage) and not able for network in networks]


def test_a_hundred_thousand_architectures_take_a_fraction_of_a_second() -> None:
    """A million in a second is what the benchmark measures; here only that nothing is done one by one."""
    codes = random_codes(MOBILE, 100_000)
    table = LatencyTable(MOBILE, random_model(MOBILE, codes[:200]))
    table.predict(codes[:1000])
    started = time.process_time()
    table.predict(codes)
    assert time.process_time() - started < 2.0
