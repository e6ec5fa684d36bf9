"""Names, units and directions of figures; limits and their intervals; figures of devices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from hardware_profiles import load_device
from nas.costs import (
    Figure,
    Limit,
    Objective,
    ProfiledDevice,
    UnknownFigure,
    at_least,
    at_most,
    cheap_figures,
    check_devices,
    check_objectives,
    maximize,
    minimize,
    parse_limit,
    parse_objective,
)
from predictors import LatencyPredictor
from search_spaces import MobileNet
from tests.nas import tiny

KNOWN = Figure(10.0, 8.0, 12.0, "predicted")
UNKNOWN = Figure(10.0, None, None, "predicted")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("latency_ms@cpu<=5", 5.0),
        ("latency_ms@cpu <= 5ms", 5.0),
        ("latency_ms@cpu<=2s", 2000.0),
        ("latency_ms@cpu<=500us", 0.5),
        ("energy_uj@mcu<=500", 500.0),
        ("energy_uj@mcu<=2.5mJ", 2500.0),
        ("energy_uj@mcu <= 0.001J", 1000.0),
        ("sram_bytes@mcu <= 320KiB", 327_680.0),
        ("flash_bytes@mcu<=1MiB", 1_048_576.0),
        ("flash_bytes@mcu<=1MB", 1_000_000.0),
        ("model_bytes<=64kB", 64_000.0),
        ("accuracy >= 92.5%", 0.925),
        ("accuracy>=9.25e-1", 0.925),
        ("macs<=15M", 15e6),
        ("params<=20k", 20_000.0),
    ],
)
def test_limits_are_read_in_any_unit_of_the_figure(text: str, value: float) -> None:
    limit = parse_limit(text)
    assert limit.value == pytest.approx(value, rel=1e-12)
    assert limit.operator == (">=" if ">=" in text else "<=")
    assert limit.device == {"c": "cpu", "m": "mcu"}.get(text.partition("@")[2][:1])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency_ms@cpu<=5KiB", "latency_ms is in ms, not 'KiB'; write a plain number, or one of ms, us, s"),
        ("sram_bytes@mcu<=5ms", "sram_bytes is in bytes, not 'ms'"),
        ("energy_uj@mcu<=5ms", "energy_uj is in uJ, not 'ms'; write a plain number, or one of uJ, mJ, J"),
        ("energy_uj<=5", "energy_uj belongs to a device; write energy_uj@DEVICE"),
        ("latency_ms<=5", "latency_ms belongs to a device; write latency_ms@DEVICE"),
        ("accuracy@cpu>=0.9", "accuracy does not depend on a device"),
        ("latencyms@cpu<=5", "did you mean 'latency_ms'?"),
        ("nothing<=5", "known: accuracy, macs"),
        ("accuracy>=95", "write accuracy>=0.9 or 90%"),
        ("macs<=1e999", "expected a finite number"),
        ("macs<=--5", "'--5' is not a number"),
        ("macs==5", r"write NAME[@DEVICE]<=NUMBER[unit]"),
        ("macs<=", r"write NAME[@DEVICE]<=NUMBER[unit]"),
        ("", r"write NAME[@DEVICE]<=NUMBER[unit]"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused_with_the_right_form(text: str, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_limit(text)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("confidence", [0.9, 0.5, 95.0, 0.0])
def test_only_the_confidence_of_the_stored_intervals_can_be_asked_for(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"only 0\.95 can be asked for"):
        parse_limit("latency_ms@cpu<=5", confidence)
    assert parse_limit("model_bytes<=5", 0.95).confidence is None  # exact: it has no interval


def test_violations_are_shares_of_the_limit_and_of_the_right_end() -> None:
    assert at_most("latency_ms", 8, "cpu").violation(KNOWN) == pytest.approx(0.25)
    assert at_most("latency_ms", 20, "cpu").violation(KNOWN) == pytest.approx(-0.5)
    assert at_least("latency_ms", 20, "cpu").violation(KNOWN) == pytest.approx(0.5)
    assert at_most("latency_ms", 11, "cpu").violation(KNOWN) < 0
    assert at_most("latency_ms", 11, "cpu", confidence=0.95).violation(KNOWN) == pytest.approx(1 / 11)
    assert at_least("latency_ms", 9, "cpu").violation(KNOWN) < 0
    assert at_least("latency_ms", 9, "cpu", confidence=0.95).violation(KNOWN) == pytest.approx(1 / 9)
    assert at_most("macs", 0).violation(Figure.exact(3)) == 3


def test_an_unknown_error_is_not_taken_for_none() -> None:
    assert at_most("latency_ms", 11, "cpu").violation(UNKNOWN) < 0
    with pytest.raises(UnknownFigure, match="error of latency_ms@cpu is not known"):
        at_most("latency_ms", 11, "cpu", confidence=0.95).violation(UNKNOWN)
    assert UNKNOWN.to_dict() == {"value": 10.0, "low": None, "high": None, "origin": "predicted"}


@pytest.mark.parametrize("value", [1_048_576, 0.1, 123_456_789, 1e-3, 2 / 3])
def test_a_limit_reads_back_from_its_text(value: float) -> None:
    limit = at_most("flash_bytes", value, "mcu")
    assert parse_limit(str(limit)).value == pytest.approx(value, rel=1e-14)
    assert parse_limit(str(at_most("macs", 1_048_577))) == at_most("macs", 1_048_577)


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (7, 10), (10, 10), (913, 1000), (1000, 1000)])
def test_an_accuracy_has_wilsons_interval(correct: int, count: int) -> None:
    figure = Figure.share(correct / count, count)
    expected = binomtest(correct, count).proportion_ci(confidence_level=0.9, method="wilson")
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert figure.low is not None and figure.high is not None
    assert figure.low <= figure.value <= figure.high and figure.origin == "measured"


def test_objectives_carry_their_direction_and_their_device(tmp_path: Path) -> None:
    assert maximize("accuracy").cost(0.9) == -0.9 and minimize("macs").cost(3.0) == 3.0
    assert parse_objective("accuracy").direction == "maximize"
    assert parse_objective("latency_ms@cpu") == minimize("latency_ms", "cpu")
    profile = tiny.device(tmp_path)
    carried = minimize("latency_ms", profile)
    assert carried.device == "toy" and carried.profiled == ProfiledDevice(profile)
    assert carried == Objective("latency_ms", "minimize", "toy") and hash(carried) == hash(parse_objective(carried.key))
    assert at_most("sram_bytes", 5, ProfiledDevice(profile)) == Limit("sram_bytes", "<=", 5.0, "toy")
    for wrong in ("latency_ms", "accuracy@cpu", "acuracy"):
        with pytest.raises(UnknownFigure):
            parse_objective(wrong)


def test_one_to_four_different_objectives() -> None:
    names = ("macs", "params", "model_bytes", "int8_macs_share")
    wanted = [maximize("accuracy"), *(minimize(name) for name in names)]
    check_objectives(wanted[:4])
    for wrong in ([], wanted, [wanted[0], wanted[0]]):
        with pytest.raises(ValueError, match=r"expected one to four|given twice"):
            check_objectives(wrong)


# devices -------------------------------------------------------------------------------------------------


def test_figures_of_a_device(tmp_path: Path) -> None:
    device = ProfiledDevice(tiny.device(tmp_path))
    space = tiny.space()
    network = space.lower(space.largest)
    kernels = {("conv2d", False): 1.0, ("conv2d", True): 2.0, ("linear", False): 1.0}
    macs_ms = sum(layer.macs * kernels[layer.kind, layer.is_depthwise] for layer in network.layers if layer.macs) * 1e-6
    figures = cheap_figures(network, ["latency_ms@toy", "sram_bytes@toy", "flash_bytes@toy", "macs"], {"toy": device})
    latency = figures["latency_ms@toy"]
    assert latency.value == pytest.approx(0.01 + macs_ms)
    assert (latency.low, latency.high) == pytest.approx((0.9 * latency.value, 1.1 * latency.value))
    assert figures["flash_bytes@toy"] == Figure.exact(network.model_bytes)
    assert figures["macs"] == Figure.exact(network.macs)
    assert [str(limit) for limit in device.memory_limits] == ["sram_bytes@toy<=40000", "flash_bytes@toy<=100000"]


def test_what_a_device_cannot_run_costs_infinitely_much(tmp_path: Path) -> None:
    space = tiny.space()
    network = space.lower(space.largest)
    device = ProfiledDevice(load_device("stm32f746"))
    for name in ("latency_ms", "sram_bytes", "flash_bytes"):
        assert device.figure(network, name).value == math.inf
    assert device.refusal(network).startswith("stm32f746 runs no fp32 conv2d")
    int8 = space.lower(space.with_precision(space.largest, "int8"))
    assert math.isfinite(device.figure(int8, "latency_ms").value) and device.refusal(int8) == ""
    assert device.figure(int8, "latency_ms").low is None


ENERGY = {
    "origin": "fitted",
    "source": "made up",
    "power_mw": 40.0,
    "relative_error": 0.25,
    "held_out": {"mape": 0.1},
}


def test_energy_is_a_figure_of_the_devices_that_have_one(tmp_path: Path) -> None:
    device = ProfiledDevice(tiny.device(tmp_path, energy=ENERGY))
    space = tiny.space()
    network = space.lower(space.largest)
    figures = cheap_figures(network, ["latency_ms@toy", "energy_uj@toy"], {"toy": device})
    energy, latency = figures["energy_uj@toy"], figures["latency_ms@toy"]
    assert energy.value == pytest.approx(40 * latency.value) and energy.origin == "predicted"
    assert (energy.low, energy.high) == pytest.approx((0.75 * energy.value, 1.25 * energy.value))
    limit = parse_limit("energy_uj@toy<=1mJ", 0.95)
    assert limit.confidence == 0.95 and minimize("energy_uj", device).unit == "uJ"
    assert limit.violation(energy) == pytest.approx(energy.high / 1000 - 1)  # type: ignore[operator]
    check_devices([limit, minimize("energy_uj", "toy")], {"toy": device})
    assert device.key != ProfiledDevice(tiny.device(tmp_path, energy=ENERGY | {"power_mw": 41.0})).key


def test_energy_of_a_device_without_one_is_refused(tmp_path: Path) -> None:
    devices = {"toy": ProfiledDevice(tiny.device(tmp_path))}
    for item in (minimize("energy_uj", "toy"), at_most("energy_uj", 5, "toy")):
        with pytest.raises(UnknownFigure, match=r"no energy of toy was measured; .*\(none is profiled here\)"):
            check_devices([item], devices)
    devices["mcu"] = ProfiledDevice(load_device("stm32l4r5-cmsisnn"))
    with pytest.raises(UnknownFigure, match=r"name a device with an energy model \(mcu\)"):
        check_devices([minimize("energy_uj", "toy")], devices)
    derived = {"origin": "derived", "source": "made up", "power_mw": 40.0}
    devices["toy"] = ProfiledDevice(tiny.device(tmp_path, energy=derived))
    check_devices([at_most("energy_uj", 5, "toy")], devices)
    with pytest.raises(UnknownFigure, match="error of the energies of toy is not known"):
        check_devices([at_most("energy_uj", 5, "toy", confidence=0.95)], devices)


def test_energy_of_a_network_that_cannot_run_is_infinite() -> None:
    space = tiny.space()
    device = ProfiledDevice(load_device("stm32l4r5-cmsisnn"))
    assert device.figure(space.lower(space.largest), "energy_uj").value == math.inf


def test_an_estimate_says_that_it_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    from hardware_profiles import device as device_module

    monkeypatch.setattr(device_module, "estimate", lambda network, accelerator: 1.5)
    space = tiny.space()
    npu = ProfiledDevice(load_device("ethos-u55-128"))
    network = space.lower(space.with_precision(space.largest, "int8"))
    assert npu.figure(network, "latency_ms") == Figure(1.5, None, None, "simulated")
    assert npu.has_latency and not npu.has_latency_error


def test_macs_on_a_device_count_the_halos_of_patches(tmp_path: Path) -> None:
    space = tiny.space(patches=(1, 2), precisions=("int8",))
    network = space.lower(space.build({"patches": 2}))
    able = ProfiledDevice(tiny.device(tmp_path, patches={"value": True, "source": "made up"}))
    figures = cheap_figures(network, ["macs@toy", "macs"], {"toy": able})
    assert figures["macs@toy"].value > figures["macs"].value == network.macs
    assert cheap_figures(space.lower(space.smallest), ["macs@toy"], {"toy": able})["macs@toy"] == Figure.exact(
        space.lower(space.smallest).macs
    )
    unable = ProfiledDevice(tiny.device(tmp_path))
    assert unable.figure(network, "macs").value == math.inf
    assert unable.refusal(network) == "toy runs no layers patch by patch (layer stem in 2 a side)"
    assert parse_limit("macs@toy<=5M").value == 5e6


def test_a_layer_that_no_measurement_covers_costs_infinitely_much_time_only(tmp_path: Path) -> None:
    swish = MobileNet(**(tiny.SPACE | {"channels": 1, "classes": 3, "nonlinearity": "hardswish"}))
    kinds = ("conv2d", "linear", "pool", "add", "reshape", "activation")
    precisions = {"source": "made up", "value": {kind: ["fp32", "int8"] for kind in kinds}}
    device = ProfiledDevice(tiny.device(tmp_path, precisions=precisions))
    network = swish.lower(swish.largest)
    assert device.figure(network, "latency_ms").value == math.inf
    assert math.isfinite(device.figure(network, "sram_bytes").value)
    assert "no measurement covers" in device.refusal(network)


def test_a_predictor_takes_the_place_of_a_latency_model_and_changes_the_key(tmp_path: Path) -> None:
    space = tiny.space()
    host = ProfiledDevice(load_device("host-cpu"))
    assert not host.has_latency and host.has_latency_error
    rng = np.random.default_rng(0)
    networks = [space.lower(space.sample(rng)) for _ in range(30)]
    fitted = [
        ProfiledDevice(host.profile, LatencyPredictor().fit(networks, [n.macs * k for n in networks])) for k in (1, 2)
    ]
    assert len({host.key, *(device.key for device in fitted)}) == 3
    assert fitted[0].has_latency
    found = fitted[1].figure(networks[0], "latency_ms")
    assert found.value == pytest.approx(fitted[1].predictor.predict(networks[:1])[0].mean_ms)  # type: ignore[union-attr]
    assert found.origin == "predicted"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        (at_most("latency_ms", 5, "stm32f764"), "did you mean 'stm32f746'?"),
        (at_most("latency_ms", 5, "phone"), "profiled here: "),
        (at_most("sram_bytes", 5, "host-cpu"), "host-cpu has no memory planner"),
        (at_most("latency_ms", 5, "stm32f746", confidence=0.95), "error of the latencies of stm32f746 is not known"),
    ],
)
def test_figures_that_a_device_does_not_have_are_refused(item: Any, said: str) -> None:
    devices = {name: ProfiledDevice(load_device(name)) for name in ("host-cpu", "stm32f746", "stm32h743")}
    check_devices(
        [at_most("latency_ms", 5, "stm32f746"), at_most("latency_ms", 5, "stm32h743", confidence=0.95)], devices
    )
    check_devices([at_most("latency_ms", 5, "host-cpu", confidence=0.95), maximize("accuracy")], devices)
    with pytest.raises(UnknownFigure) as caught:
        check_devices([item], devices)
    assert said in str(caught.value)
