"""Vela's estimates: a stand-in for the program shows what is asked and read; the real one is asked where it is."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware_profiles import UnavailableCost, UnsupportedLayer, load_device
from hardware_profiles import vela as vela_module
from hardware_profiles.vela import VelaFailed, estimate
from search_spaces import INPUT, INT8, Layer, MobileNet, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

HAS_VELA = find_spec("ethosu") is not None

STAND_IN = """
import sys
from pathlib import Path
file, *options = sys.argv[1:]
assert Path(file).read_bytes()[4:8] == b"TFL3"
out = Path(options[options.index("--output-dir") + 1])
with Path({log!r}).open("a") as log:
    print(options[options.index("--accelerator-config") + 1], file=log)
{body}
"""
WORKING = """
print("CPU operators = 0 (0.0%)")
(out / "network_summary_Some_Config.csv").write_text("experiment,inference_time,batch_size\\ndefault,0.00125,1\\n")
"""


def network(seed: int = 0) -> Network:
    space = MobileNet(precisions=("int8",), resolutions=(24, 32))
    return space.lower(space.sample(np.random.default_rng(seed)))


@pytest.fixture(autouse=True)
def _forgetful() -> Iterator[None]:
    estimate.cache_clear()
    yield
    estimate.cache_clear()


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A package `ethosu.vela` that does what `body` says; returns its log of accelerators."""
    package = folder / "site" / "ethosu" / "vela"
    package.mkdir(parents=True)
    for path in (package.parent, package):
        (path / "__init__.py").touch()
    log = folder / "log.txt"
    (package / "__main__.py").write_text(STAND_IN.format(log=str(log), body=body))
    monkeypatch.setenv("PYTHONPATH", str(folder / "site"))
    monkeypatch.setattr(vela_module, "find_spec", lambda name: object())
    return log


def test_seconds_become_milliseconds_and_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = install(tmp_path, monkeypatch, WORKING)
    device = load_device("ethos-u55-128")
    prediction = device.latency(network())
    assert (prediction.mean_ms, prediction.low_ms, prediction.high_ms) == (1.25, None, None)
    assert prediction.origin == "simulated" == device.latency_model.origin
    assert device.latency(network()) == prediction and log.read_text() == "ethos-u55-128\n"
    estimate(network(), "ethos-u55-32")
    assert log.read_text() == "ethos-u55-128\nethos-u55-32\n"


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        (WORKING.replace("= 0 (", "= 2 ("), UnsupportedLayer, "2 operators would not run on the ethos-u55-128"),
        (WORKING.replace("CPU operators", "operators"), UnsupportedLayer, "an unknown number of operators"),
        ("sys.exit('no such thing')", VelaFailed, "ended with code 1: no such thing"),
        ("print('CPU operators = 0 (0.0%)')", VelaFailed, "wrote no summary"),
    ],
)
def test_what_vela_cannot_tell_is_refused(
    body: str, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, body)
    with pytest.raises(error, match=said):
        load_device("ethos-u55-128").latency(network())


def test_where_vela_is_missing_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vela_module, "find_spec", lambda name: None)
    with pytest.raises(UnavailableCost, match=r"ethos-u55-128: Vela is not installed; pip install 'fitnest\[npu\]'"):
        load_device("ethos-u55-128").latency(network())


def test_the_profile_says_what_it_is() -> None:
    device = load_device("ethos-u55-128")
    assert device.kind == "npu" and not device.is_measured and device.latency_model.relative_error is None
    assert "Not a measurement" in device.latency_model.source
    fp32 = MobileNet(precisions=("fp32",))
    illegal = device.illegal_layers(fp32.lower(fp32.smallest))
    assert len(illegal) == len(fp32.lower(fp32.smallest).layers)


@pytest.mark.skipif(not HAS_VELA, reason="needs ethos-u-vela, the optional extra npu")
def test_vela_is_never_faster_than_the_hardware_and_slower_for_more_work() -> None:
    device = load_device("ethos-u55-128")
    space = MobileNet(precisions=("int8",))
    small, large = (space.lower(end) for end in (space.smallest, space.largest))
    times = [device.latency(one).mean_ms for one in (small, large)]
    peak_macs_per_ms = 128 * 500e6 / 1000
    assert times[0] > small.macs / peak_macs_per_ms and times[1] > large.macs / peak_macs_per_ms
    assert times[1] > 2 * times[0]
    estimate.cache_clear()
    assert device.latency(small).mean_ms == times[0]


@pytest.mark.skipif(not HAS_VELA, reason="needs ethos-u-vela, the optional extra npu")
def test_a_network_written_here_costs_what_the_published_file_of_it_costs(data_folder: Path, tmp_path: Path) -> None:
    """MLPerf Tiny's residual network, whose trained weights compress as little as normal ones; its softmax is left."""
    made: list[Layer] = []

    def conv(name: str, source: Port, width: int, **options: Any) -> Port:
        made.append(L.conv2d(name, source, width, padding="same", precision=INT8, **options))
        return port(made[-1])

    tensor = conv("stem", Port(INPUT, (3, 32, 32)), 16, kernel=3, activation="relu")
    for index, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
        body = conv(f"first{index}", tensor, width, kernel=3, stride=stride, activation="relu")
        body = conv(f"second{index}", body, width, kernel=3)
        shortcut = conv(f"shortcut{index}", tensor, width, stride=stride) if stride > 1 else tensor
        made.append(L.add(f"add{index}", body, shortcut))
        tensor = port(made[-1])
    pool = L.global_average_pool("pool", tensor)
    flat = L.reshape("flat", port(pool), (64,))
    classifier = L.linear("classifier", port(flat), 10, precision=INT8)
    network = assemble((3, 32, 32), [(*made, pool, flat, classifier)])
    assert network.macs == 12_501_632
    published = (data_folder / "mlperf_tiny_models" / "pretrainedResnet_quant.tflite").read_bytes()
    (tmp_path / "network.tflite").write_bytes(published)
    vela_module._run_vela(tmp_path, "ethos-u55-128")
    assert estimate(network, "ethos-u55-128") == pytest.approx(vela_module._inference_ms(tmp_path), rel=0.05)
