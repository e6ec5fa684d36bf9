"""What the limits and the devices of a search allow, by hand-made devices."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from nas.candidates import Costs
from nas.costs import Figure, ProfiledDevice, at_least, at_most, maximize, minimize
from tests.nas import tiny

KINDS = ("conv2d", "linear", "pool", "add", "reshape")


def test_violations_are_shares_of_the_limits_that_are_known(tmp_path: Path) -> None:
    device = ProfiledDevice(tiny.device(tmp_path))
    given = [at_most("macs", 10_000), at_least("accuracy", 0.8), at_most("latency_ms", 1e-3, device)]
    costs = Costs(tiny.space(), [maximize("accuracy")], given, {"toy": device})
    assert [str(limit) for limit in costs.limits[3:]] == ["sram_bytes@toy<=40000", "flash_bytes@toy<=100000"]
    network = costs.space.lower(costs.space.largest)
    figures = costs.figures(network)
    found = costs.violations(network, figures)
    assert set(found) == {"legal@toy", *map(str, costs.limits)} - {"accuracy>=0.8"}
    assert found["legal@toy"] == 0 and found["macs<=10000"] == pytest.approx(network.macs / 10_000 - 1)
    assert found["latency_ms@toy<=0.001"] == pytest.approx(figures["latency_ms@toy"].value / 1e-3 - 1)
    assert found["flash_bytes@toy<=100000"] == pytest.approx(network.model_bytes / 100_000 - 1)
    known = costs.violations(network, figures | {"accuracy": Figure.share(0.6, 100)})
    assert known["accuracy>=0.8"] == pytest.approx(0.25)


def test_what_a_device_cannot_run_counts_in_place_of_its_limits(tmp_path: Path) -> None:
    fp32 = {"source": "made up", "value": {kind: ["fp32"] for kind in KINDS}}
    device = ProfiledDevice(tiny.device(tmp_path, precisions=fp32))
    costs = Costs(tiny.space(), [], [at_most("macs", 10_000), at_most("latency_ms", 1e-3, device)], {"toy": device})
    assert costs.precisions == ("fp32",)
    illegal = costs.space.with_precision(costs.space.largest, "int8")
    network = costs.space.lower(illegal)
    found = costs.violations(network, costs.figures(network))
    assert set(found) == {"legal@toy", "macs<=10000"} and found["legal@toy"] >= len(network.layers) // 2
    assert costs.legalize(illegal) == costs.space.with_precision(costs.space.largest, "fp32")


def test_a_network_that_no_price_covers_cannot_be_run_either(tmp_path: Path) -> None:
    latency = yaml.safe_load(tiny.device_yaml())["latency"]
    latency["coefficients_ms"] = {k: v for k, v in latency["coefficients_ms"].items() if "depthwise" not in k}
    device = ProfiledDevice(tiny.device(tmp_path, latency=latency))
    costs = Costs(tiny.space(), [], [at_most("latency_ms", 1.0, device)], {"toy": device})
    network = costs.space.lower(costs.space.largest)
    assert not device.profile.illegal_layers(network) and math.isinf(costs.figures(network)["latency_ms@toy"].value)
    found = costs.violations(network, costs.figures(network))
    assert set(found) == {"legal@toy"} and found["legal@toy"] >= 1
    assert not costs.allowed(costs.space.encode([costs.space.largest])).any()
    wanted = Costs(tiny.space(), [minimize("latency_ms", device)], [], {"toy": device})  # nor where nothing limits it
    assert not wanted.allowed(wanted.space.encode([wanted.space.largest])).any()


def test_what_one_device_cannot_run_is_judged_on_the_others(tmp_path: Path) -> None:
    latency = yaml.safe_load(tiny.device_yaml())["latency"]
    latency["coefficients_ms"] = {k: v for k, v in latency["coefficients_ms"].items() if "depthwise" not in k}
    poor, able = ProfiledDevice(tiny.device(tmp_path, "poor", latency=latency)), ProfiledDevice(tiny.device(tmp_path))
    costs = Costs(
        tiny.space(), [], [at_most("latency_ms", 1.0, each) for each in (poor, able)], {"poor": poor, "toy": able}
    )
    network = costs.space.lower(costs.space.largest)
    found = costs.violations(network, costs.figures(network))
    assert found["legal@poor"] >= 1 and found["legal@toy"] == 0
    assert set(found) == {"legal@poor", "legal@toy", "latency_ms@toy<=1", *map(str, able.memory_limits)}
