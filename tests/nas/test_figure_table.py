"""Figures of codes against those of each lowered network, over every family and several devices."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from hardware_profiles import AdditiveModel, features, load_device
from nas import figure_table
from nas.candidates import Costs
from nas.costs import ProfiledDevice, at_least, at_most, maximize
from nas.figure_table import Estimates, FigureTable
from predictors import LatencyPredictor
from search_spaces import FAMILIES, CompactTransformer, MobileNet, SearchSpace
from tests.nas import tiny

SPACES = {
    "mobilenet": MobileNet(resolutions=(8, 12), widths=(8, 16), depths=(1, 2), squeeze_excite=(False, True)),
    "patches": MobileNet(resolutions=(16,), widths=(8, 16), depths=(1, 2), patches=(1, 2, 3), strides=(1, 2)),
    "compact_transformer": CompactTransformer(resolutions=(8, 16), embeddings=(32, 48), depths=(1, 2), head_size=16),
}
DEVICES = ("adreno540", "host-cpu", "nrf5340-cmsisnn", "stm32h743", "stm32h743-tflm", "stm32h7a3-xcubeai")


def random_codes(space: SearchSpace, count: int) -> np.ndarray:
    """Of which a half is in one precision, which some device has, and not all are canonical."""
    rng = np.random.default_rng(3)
    columns = []
    for choice in space.choices:
        drawn = rng.integers(len(choice.options), size=count)
        if choice.role == "precision":
            drawn[: count // 2] = len(choice.options) - 1
        columns.append(drawn)
    return np.stack(columns, axis=1)


def test_every_family_is_here() -> None:
    assert {space.family for space in SPACES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", DEVICES)
@pytest.mark.parametrize("space", SPACES.values(), ids=SPACES)
def test_figures_of_codes_are_those_of_the_networks(space: SearchSpace, name: str) -> None:
    device = ProfiledDevice(load_device(name))
    model = device.profile.latency_model
    limits = [at_most("flash_bytes", 150_000, device), at_most("macs", 3e5, device), at_least("int8_macs_share", 0.2)]
    if device.has_latency:
        limits.append(at_most("latency_ms", 5.0, device, confidence=0.95 if model.relative_error else None))
    if device.profile.planner:
        limits.append(at_most("sram_bytes", 20_000, device))
    if device.profile.energy_model:
        limits.append(at_least("energy_uj", 1.0, device))
    costs = Costs(space, [maximize("accuracy")], limits, {name: device})
    codes = random_codes(space, 16)
    found, allowed = costs.of_codes(codes), costs.allowed(codes)
    bounds, _ = costs.table.bounds(codes)
    assert set(found) == {*costs.keys, *(str(limit) for limit in costs.limits if limit.confidence)} - {"accuracy"}
    for i, row in enumerate(codes):
        network = space.lower(space.from_codes(row))
        figures = costs.figures(network)
        for key, figure in figures.items():
            if key.startswith(("latency_ms", "energy_uj")):
                assert found[key][i] == pytest.approx(figure.value, rel=1e-12), key
            else:
                assert found[key][i] == figure.value, key
            assert bounds[key].value[i] <= figure.value * (1 + 1e-12), key
        for limit in (limit for limit in costs.limits if limit.confidence and math.isfinite(figures[limit.key].value)):
            assert found[str(limit)][i] == pytest.approx(figures[limit.key].high, rel=1e-12)
        assert allowed[i] == (max(costs.violations(network, figures).values(), default=0.0) <= 0)


def test_adds_that_are_not_fused_are_priced_as_in_the_networks() -> None:
    """Float adds of what another slot made in integers, on a device that computes 16 channels at once."""
    space = tiny.space()
    codes = random_codes(space, 60)
    networks = [space.lower(space.from_codes(row)) for row in codes]
    names = {name for network in networks for name in features(network, 16)}
    prices = {name: 1.0 if name.startswith("add.fp32.unfused") else 1e-3 for name in names}
    latency_ms = [AdditiveModel(prices, 0.1, 16).latency_ms(network) for network in networks]
    predictor = LatencyPredictor(channel_block=16).fit(networks, latency_ms)
    device = ProfiledDevice(load_device("host-cpu"), predictor)
    limit = at_most("latency_ms", float(np.median(latency_ms)), device)
    costs = Costs(space, [maximize("accuracy")], [limit], {"host-cpu": device})
    expected = [one.mean_ms for one in predictor.predict(networks)]
    assert sum("add.fp32.unfused_count" in features(network, 16) for network in networks) > 10
    assert costs.of_codes(codes)[limit.key] == pytest.approx(expected, rel=1e-9)
    assert costs.allowed(codes).tolist() == [one <= limit.value for one in expected]


def test_what_is_bounded_beyond_a_limit_is_not_lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = {"planner": "tflm_greedy", "storage": "tflite"}
    memory |= {n: {"value": 0, "source": "made up"} for n in ("sram_overhead_bytes", "flash_overhead_bytes")}  # type: ignore[misc]
    device = ProfiledDevice(tiny.device(tmp_path, memory=memory, limits=None))
    space = tiny.space()
    codes = random_codes(space, 60)
    needed = [device.profile.sram_bytes(space.lower(space.from_codes(row))) for row in codes]
    limit = at_most("sram_bytes", float(np.median(needed)), device)
    costs = Costs(space, [maximize("accuracy")], [limit], {"toy": device})
    lowered: list[object] = []
    lower = MobileNet.lower
    monkeypatch.setattr(MobileNet, "lower", lambda self, a: lowered.append(a) or lower(self, a))
    assert costs.allowed(codes).tolist() == [bytes_ <= limit.value for bytes_ in needed]
    assert 0 < len(lowered) < 60


def test_intervals_are_shares_of_the_value_and_what_cannot_run_stays_infinite() -> None:
    value = np.array([2.0, np.inf])
    found = Estimates.within(value, 0.25)
    assert found.low is not None and found.high is not None
    assert (found.low.tolist(), found.high.tolist()) == ([1.5, math.inf], [2.5, math.inf])
    wide = Estimates.within(value, 1.5)
    assert wide.low is not None and wide.low.tolist() == [0.0, math.inf]
    limits = [at_most("latency_ms", 1.0, "toy", confidence=0.95), at_least("energy_uj", 1.0, "toy", confidence=0.95)]
    assert [found.judged_by(limit)[0] for limit in limits] == [2.5, 1.5]
    unknown = Estimates.within(value, None)
    assert unknown.low is unknown.high is None and unknown.judged_by(limits[0]) is value


def test_the_end_of_an_interval_is_by_the_error_of_the_figure_itself_and_not_below_zero(tmp_path: Path) -> None:
    latency = yaml.safe_load(tiny.device_yaml())["latency"] | {"relative_error": 1.5}
    energy = {"origin": "fitted", "source": "made up", "power_mw": 40.0, "relative_error": 0.25, "held_out": {}}
    device = ProfiledDevice(tiny.device(tmp_path, latency=latency, energy=energy))
    limits = [
        made(name, 1.0, device, confidence=0.95) for name in ("latency_ms", "energy_uj") for made in (at_most, at_least)
    ]
    table = FigureTable(tiny.space(), {limit.key for limit in limits}, {"toy": device})
    assert [table.end(limit) for limit in limits] == [2.5, 0.0, 1.25, 0.75]
    assert table.end(at_most("latency_ms", 1.0, device)) == 1.0


def test_many_architectures_are_judged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_table, "ROWS_AT_ONCE", 7)
    space = tiny.space()
    codes = random_codes(space, 20)
    macs = [space.lower(space.from_codes(row)).macs for row in codes]
    limit = at_most("macs", float(np.median(macs)))
    costs = Costs(space, [maximize("accuracy")], [limit], {})
    assert costs.allowed(codes).tolist() == [each <= limit.value for each in macs]
