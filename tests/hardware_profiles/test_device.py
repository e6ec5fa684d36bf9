"""Device profiles: the shipped ones hold together, and a wrong file is refused in one line that says where."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from hardware_profiles.command import CommandSettings
from hardware_profiles.cost_model import UnsupportedLayer, features
from hardware_profiles.device import (
    SHIPPED,
    InvalidProfile,
    UnavailableCost,
    UnknownDevice,
    device_names,
    load_device,
)
from hardware_profiles.memory import flash_bytes, peak_sram_bytes, persistent_sram_bytes
from search_spaces import CompactTransformer, MobileNet, Network

INT8_NET = MobileNet(precisions=("int8",))
FP32_NET = MobileNet(precisions=("fp32",))


def sampled(space: Any, seed: int = 3) -> Network:
    return space.lower(space.sample(np.random.default_rng(seed)))


def write(folder: Path, change: dict[str, Any]) -> Path:
    """The STM32H743's profile with the values at some dotted keys replaced, or removed where None."""
    data = yaml.safe_load((SHIPPED / "stm32h743.yaml").read_text())
    for dotted, value in change.items():
        *parents, last = dotted.split("/")
        section = data
        for parent in parents:
            section = section[parent]
        if value is None:
            del section[last]
        else:
            section[last] = value
    path = folder / "device.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def documented() -> dict[str, Any]:
    """The example of docs/add_a_device.md."""
    page = (Path(__file__).parents[2] / "docs" / "add_a_device.md").read_text()
    return yaml.safe_load(page.split("```yaml\n")[1].split("```")[0])


LEFT_OUT: list[tuple[list[str], dict[str, Any]]] = [
    ([], {"name": "my-board", "sram_limit_bytes": 524_288, "patches": True, "sram_overhead": 0.075}),
    (["limits"], {"sram_limit_bytes": None, "flash_limit_bytes": None}),
    (["patches"], {"patches": False}),
    (["memory"], {"planner": None, "flash_overhead_bytes": 0, "storage": "c_arrays"}),
    (["memory", "explicit_padding"], {"explicit_padding": "never"}),
    (["memory", "storage"], {"storage": "c_arrays"}),
    (["energy"], {"energy_model": None}),
]


@pytest.mark.parametrize(("key", "expected"), LEFT_OUT, ids=[".".join(key) for key, _ in LEFT_OUT])
def test_what_the_documentation_says_may_be_left_out(key: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    content = documented()
    section = content
    for name in key[:-1]:
        section = section[name]
    for name in key[-1:]:
        del section[name]
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(content))
    device = load_device(tmp_path / "device.yaml")
    assert {name: getattr(device, name) for name in expected} == expected


@pytest.mark.parametrize("key", [("limits", "sram_bytes"), ("memory", "planner"), ("memory", "flash_overhead_bytes")])
def test_what_the_documentation_says_is_needed(key: tuple[str, str], tmp_path: Path) -> None:
    content = documented()
    del content[key[0]][key[1]]
    (tmp_path / "device.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidProfile, match=f"missing key '{'.'.join(key)}'"):
        load_device(tmp_path / "device.yaml")


def test_a_memory_has_one_overhead_of_sram_or_both(tmp_path: Path) -> None:
    content, path = documented(), tmp_path / "device.yaml"
    share = content["memory"].pop("sram_overhead")
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidProfile, match=r"missing key 'memory\.sram_overhead'"):
        load_device(path)
    content["memory"]["sram_overhead_bytes"] = {"value": 100, "source": "..."}
    path.write_text(yaml.safe_dump(content))
    assert (load_device(path).sram_overhead, load_device(path).sram_overhead_bytes) == (0.0, 100)
    content["memory"]["sram_overhead"] = share
    path.write_text(yaml.safe_dump(content))
    assert (load_device(path).sram_overhead, load_device(path).sram_overhead_bytes) == (0.075, 100)


def test_the_host_with_more_threads_is_a_device_of_its_own() -> None:
    one, four = load_device("host-cpu"), load_device("host-cpu-4-threads")
    assert (four.name, four.threads, four.is_at_hand) == ("host-cpu-4-threads", 4, True)
    assert four.precisions == one.precisions and "4 threads" in four.title
    for wrong in ("host-cpu-1-threads", "host-cpu-0-threads", "adreno540-4-threads", "host-cpu-4"):
        with pytest.raises(UnknownDevice):
            load_device(wrong)


def test_the_shipped_devices_load_under_their_names() -> None:
    kinds = {
        "adreno430": "gpu",
        "adreno512": "gpu",
        "adreno540": "gpu",
        "adreno620": "gpu",
        "adreno640": "gpu",
        "adreno740": "gpu",
        "cortex-a76": "cpu",
        "ethos-u55-128": "npu",
        "host-cpu": "cpu",
        "mali-g52": "gpu",
        "mali-g610": "gpu",
        "mali-g72": "gpu",
        "mali-t764": "gpu",
        "mali-t860": "gpu",
        "nrf5340-cmsisnn": "mcu",
        "pixel4": "cpu",
        "stm32f746": "mcu",
        "stm32h743": "mcu",
        "stm32h743-tflm": "mcu",
        "stm32h743-tflm-cmsis": "mcu",
        "stm32h743-xcubeai": "mcu",
        "stm32h7a3-xcubeai": "mcu",
        "stm32l4r5-cmsisnn": "mcu",
        "stm32l4r5-xcubeai": "mcu",
        "stm32u575-xcubeai": "mcu",
        "xiaomi11": "cpu",
    }
    assert device_names() == tuple(sorted(kinds))
    for name in device_names():
        profile = load_device(name)
        assert profile.name == name
        assert profile.latency_model.source
        assert all(profile.sources.values())
        assert profile.kind == kinds[name]
        assert profile.energy_model is None or profile.energy_model.source


def test_the_library_is_part_of_a_microcontrollers_profile() -> None:
    """One chip, four libraries: the reference kernels take ten times the vendor's time for the same network."""
    network = sampled(INT8_NET)
    runtimes = {name: load_device(name) for name in device_names() if name.startswith("stm32h743")}
    assert len({device.runtime for device in runtimes.values()}) == 4
    ms = {name: device.latency(network).mean_ms for name, device in runtimes.items()}
    assert ms["stm32h743"] < ms["stm32h743-xcubeai"] < ms["stm32h743-tflm-cmsis"] < ms["stm32h743-tflm"]
    assert ms["stm32h743-tflm"] > 5 * ms["stm32h743-tflm-cmsis"]


def test_limits_of_the_microcontrollers() -> None:
    small, large = load_device("stm32f746"), load_device("stm32h743")
    assert (small.sram_limit_bytes, small.flash_limit_bytes) == (320 * 1024, 1024**2)
    assert (large.sram_limit_bytes, large.flash_limit_bytes) == (512 * 1024, 2 * 1024**2)
    assert load_device("adreno540").sram_limit_bytes is None


def test_a_microcontroller_has_integers_only() -> None:
    mcu = load_device("stm32f746")
    assert mcu.illegal_layers(sampled(INT8_NET)) == ()
    network = sampled(FP32_NET)
    assert mcu.illegal_layers(network) == tuple(layer.name for layer in network.layers)
    swish = sampled(MobileNet(precisions=("int8",), nonlinearity="hardswish"))
    illegal = mcu.illegal_layers(swish)
    assert illegal == tuple(layer.name for layer in swish.layers if not layer.precision.is_quantized)
    assert "stem.activation" in illegal and "stem" not in illegal


def test_the_phone_gpu_has_floats_only_and_the_host_both() -> None:
    mixed = sampled(MobileNet())
    integers = tuple(layer.name for layer in mixed.layers if layer.precision.is_quantized)
    assert load_device("adreno540").illegal_layers(mixed) == integers != ()
    assert load_device("host-cpu").illegal_layers(mixed) == ()
    assert load_device("host-cpu").illegal_layers(sampled(CompactTransformer())) == ()


def test_latency_is_the_price_list_times_the_features() -> None:
    network = sampled(INT8_NET)
    prices = yaml.safe_load((SHIPPED / "stm32h743.yaml").read_text())["latency"]
    mean = sum(prices["coefficients_ms"].get(name, 0.0) * amount for name, amount in features(network).items())
    prediction = load_device("stm32h743").latency(network)
    assert prediction.mean_ms == pytest.approx(mean, rel=1e-12) and mean > 0
    assert prediction.low_ms == pytest.approx(mean * (1 - prices["relative_error"]))
    assert prediction.high_ms == pytest.approx(mean * (1 + prices["relative_error"]))
    assert prediction.origin == "predicted"


def test_a_derived_model_is_the_other_clock_and_claims_no_interval() -> None:
    network = sampled(INT8_NET)
    slow, fast = load_device("stm32f746"), load_device("stm32h743")
    assert slow.latency_model.origin == "derived" and slow.latency_model.held_out == {}
    assert slow.latency(network).mean_ms == pytest.approx(fast.latency(network).mean_ms * 480 / 216, rel=1e-5)
    assert slow.latency(network).low_ms is None and slow.latency(network).high_ms is None


def test_what_no_measurement_covers_is_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"block0\.attention\.norm"):
        load_device("adreno540").latency(sampled(CompactTransformer(precisions=("fp32",))))
    assert load_device("adreno540").latency(sampled(FP32_NET)).mean_ms > 0
    with pytest.raises(UnsupportedLayer, match="stem"):
        load_device("stm32h743").latency(sampled(FP32_NET))


def test_unavailable_costs_say_so() -> None:
    host = load_device("host-cpu")
    assert host.is_measured and host.is_at_hand and not load_device("adreno540").is_measured
    with pytest.raises(UnavailableCost, match="host-cpu has no latency model"):
        host.latency(sampled(FP32_NET))
    with pytest.raises(UnavailableCost, match="host-cpu has no memory planner"):
        host.sram_bytes(sampled(FP32_NET))
    with pytest.raises(UnavailableCost, match="stm32h743 has no energy model"):
        load_device("stm32h743").energy(1.0)


def test_energy_is_power_times_latency() -> None:
    mcu = load_device("stm32l4r5-xcubeai")
    section = yaml.safe_load((SHIPPED / "stm32l4r5-xcubeai.yaml").read_text())["energy"]
    energy = mcu.energy(20.0)
    assert energy.mean_uj == pytest.approx(20 * section["power_mw"])
    assert energy.low_uj == pytest.approx(energy.mean_uj * (1 - section["relative_error"]))
    assert energy.high_uj == pytest.approx(energy.mean_uj * (1 + section["relative_error"]))


def test_a_derived_energy_claims_no_interval(tmp_path: Path) -> None:
    mcu = load_device(write(tmp_path, {"energy": {"origin": "derived", "source": "made up", "power_mw": 50}}))
    energy = mcu.energy(2.0)
    assert (energy.mean_uj, energy.low_uj, energy.high_uj) == (100.0, None, None)


def test_overhead_may_be_a_share_or_bytes_or_both(tmp_path: Path) -> None:
    network = sampled(INT8_NET)
    planned = peak_sram_bytes(network, "inplace_depthwise")
    extra = {"value": 5000, "source": "made up"}
    both = load_device(write(tmp_path, {"memory/sram_overhead_bytes": extra}))
    assert both.sram_bytes(network) == ceil(planned * (1 + both.sram_overhead)) + 5000
    bytes_only = load_device(write(tmp_path, {"memory/sram_overhead_bytes": extra, "memory/sram_overhead": None}))
    assert bytes_only.sram_bytes(network) == planned + 5000
    assert bytes_only.sources["memory.sram_overhead_bytes"] == "made up"


def test_memory_is_the_plan_and_the_overhead() -> None:
    network, mcu = sampled(INT8_NET), load_device("stm32h743")
    memory = yaml.safe_load((SHIPPED / "stm32h743.yaml").read_text())["memory"]
    planned = peak_sram_bytes(network, "inplace_depthwise")
    assert mcu.sram_bytes(network) == ceil(planned * (1 + memory["sram_overhead"]["value"])) > planned
    assert mcu.flash_bytes(network) == network.model_bytes + memory["flash_overhead_bytes"]["value"]
    assert load_device("host-cpu").flash_bytes(network) == network.model_bytes


def test_an_unknown_name_gets_the_nearest_one_and_is_never_a_path() -> None:
    with pytest.raises(UnknownDevice, match=r"unknown device 'stm32h747'; did you mean 'stm32h743'\?") as caught:
        load_device("stm32h747")
    assert isinstance(caught.value, LookupError)
    with pytest.raises(UnknownDevice, match=r"known: adreno430, .*host-cpu"):
        load_device("zzz")


def test_a_bare_name_means_a_shipped_profile_even_where_a_file_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {}).rename(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownDevice):
        load_device("mine")
    assert load_device("./mine").name == "stm32h743"


def test_a_file_is_read_by_path(tmp_path: Path) -> None:
    path = write(tmp_path, {"name": "my-board", "limits/sram_bytes/value": 1000})
    assert load_device(path) == load_device(str(path))
    assert (load_device(path).name, load_device(path).sram_limit_bytes) == ("my-board", 1000)
    with pytest.raises(UnknownDevice, match="cannot read the device file"):
        load_device(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema: expected 1"),
        ({"kind": "tpu"}, "kind: expected one of cpu, mcu, gpu, npu, got 'tpu'"),
        ({"threads": True}, "threads: expected an integer of 1 or more, got True"),
        ({"name": "../evil"}, "name: expected lower-case letters"),
        ({"titel": "x"}, r"unknown key 'titel'; did you mean 'title'\?"),
        ({"title": None, "titel": "x"}, r"missing key 'title'; did you mean it by 'titel'\?"),
        ({"limits/sram_bytes/value": "512KB"}, r"limits\.sram_bytes\.value: expected an integer of 1 or more"),
        ({"limits/sram_bytes": 524288}, r"limits\.sram_bytes: expected a mapping with names as keys, got 524288"),
        ({"limits/flash_bytes/source": None}, r"missing key 'limits\.flash_bytes\.source'"),
        ({"precisions/value/conv2d": ["int4"]}, r"precisions\.value\.conv2d: expected a list of fp32, int8"),
        (
            {"precisions/value/conv": ["int8"]},
            r"unknown kind of layer 'precisions\.value\.conv'; did you mean 'conv2d'",
        ),
        (
            {"memory/planner": "greedy"},
            r"memory\.planner: expected one of liveness, .*, tflm_greedy, got 'greedy'",
        ),
        ({"memory/sram_overhead/value": float("nan")}, r"memory\.sram_overhead\.value: expected a number of 0"),
        ({"latency/coefficients_ms/conv.int8.macs": -1.0}, r"conv\.int8\.macs: expected a number of 0 or more, got -1"),
        ({"latency/coefficients_ms/convv.int8.macs": 1.0}, r"FAMILY\.PRECISION\.QUANTITY; did you mean 'conv'\?"),
        ({"latency/held_out": None}, r"missing key 'latency\.held_out'"),
        ({"latency/constant": 1.0}, r"unknown key 'latency\.constant'; did you mean 'constant_ms'\?"),
        ({"memory/sram_overhead": None}, r"missing key 'memory\.sram_overhead'"),
        ({"memory/sram_overhead_bytes": {"value": 0.5, "source": "x"}}, r"sram_overhead_bytes\.value: expected an int"),
        ({"energy": {"origin": "fitted", "source": "x", "power_mw": 5}}, r"missing key 'energy\.relative_error'"),
        ({"energy": {"origin": "measured", "source": "x"}}, r"energy\.origin: expected one of fitted, derived"),
        ({"energy": {"origin": "derived", "source": "x", "power_mw": -5}}, r"energy\.power_mw: expected a number of 0"),
        (
            {"energy": {"origin": "derived", "source": "x", "power_mw": 5, "held_out": {}}},
            r"unknown key 'energy\.held_out'",
        ),
        (
            {"latency": {"origin": "simulated", "source": "x", "accelerator": "ethos"}},
            r"latency\.accelerator: expected one of ethos-u55-32",
        ),
        ({"latency": {"origin": "simulated", "source": "x"}}, r"missing key 'latency\.accelerator'"),
        ({"latency": "fast"}, r"latency: expected a mapping with names as keys, got 'fast'"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write(tmp_path, change)
    with pytest.raises(InvalidProfile, match=message) as caught:
        load_device(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", "", "!!python/object/apply:os.getcwd []", "1: 2\n"])
def test_what_is_no_profile_at_all_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "device.yaml"
    path.write_text(content)
    with pytest.raises(InvalidProfile) as caught:
        load_device(path)
    assert "\n" not in str(caught.value)


MEASURED = {"origin": "measured", "source": "measured through adb"}


def test_a_device_may_be_measured_by_a_command(tmp_path: Path) -> None:
    command = "adb-latency.sh {model}"
    settings = {"timeout_s": 60, "retries": 0, "repeats": 7, "anchor": False}
    for given in ({}, settings):
        model = load_device(write(tmp_path, {"latency": {**MEASURED, "command": command, **given}})).latency_model
        assert model.command == CommandSettings(command, **given)
    assert load_device(write(tmp_path, {"latency": MEASURED})).latency_model.command is None
    assert load_device("host-cpu").latency_model.command is None


@pytest.mark.parametrize(
    ("latency", "message"),
    [
        ({"command": "adb shell bench"}, r"latency\.command: no \{model\} in 'adb shell bench'"),
        ({"command": 3}, r"latency\.command: expected a text"),
        ({"command": "run {model}", "timeout_s": "1min"}, r"latency\.timeout_s: expected seconds above 0, got '1min'"),
        ({"command": "run {model}", "repeat": 3}, r"unknown key 'latency\.repeat'; did you mean 'repeats'\?"),
        ({"timeout_s": 3}, r"unknown key 'latency\.timeout_s'"),
        ({"comand": "run {model}"}, r"unknown key 'latency\.comand'; did you mean 'command'\?"),
        ({"origin": "derived", "command": "run {model}"}, r"missing key 'latency\.constant_ms'"),
        (
            {"command": "run {model}", "this_machine": True},
            r"latency\.this_machine: expected a command or this_machine",
        ),
        ({"this_machine": "yes"}, r"latency\.this_machine: expected true or false, got 'yes'"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(tmp_path: Path, latency: dict[str, Any], message: str) -> None:
    path = write(tmp_path, {"latency": {**MEASURED, **latency}})
    with pytest.raises(InvalidProfile, match=message) as caught:
        load_device(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_patches_are_legal_only_where_the_runtime_runs_them(tmp_path: Path) -> None:
    space = MobileNet(precisions=("int8",), patches=(1, 2), patch_stages=(1,))
    network = space.lower(space.build({"patches": 2}))
    stage = tuple(layer.name for layer in network.patch_stage)
    assert stage
    for name in device_names():
        profile = load_device(name)
        assert profile.patches == (profile.runtime == "TinyEngine")
        assert set(stage) <= set(profile.illegal_layers(network)) or profile.patches
    able, unable = load_device("stm32h743"), load_device(write(tmp_path, {"patches": None}))
    assert able.illegal_layers(network) == ()
    assert unable.illegal_layers(network) == stage
    assert able.macs(network) > network.macs == able.macs(space.lower(space.smallest))
    whole = space.lower(space.unpatched(space.build({"patches": 2})))
    assert able.latency(network).mean_ms > able.latency(whole).mean_ms


def test_an_interpreter_pads_and_keeps_more(tmp_path: Path) -> None:
    network = sampled(INT8_NET)
    change = {
        "memory/planner": "tflm_greedy",
        "memory/explicit_padding": "always",
        "memory/storage": "tflite",
        "memory/sram_overhead/value": 0.0,
    }
    profile = load_device(write(tmp_path, change))
    assert profile.sram_bytes(network) == (
        peak_sram_bytes(network, "tflm_greedy", explicit_padding="always") + persistent_sram_bytes(network, "tflite")
    )
    assert profile.flash_bytes(network) == flash_bytes(network, profile.flash_overhead_bytes, "tflite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patches/value": 4}, r"patches\.value: expected true or false, got 4"),
        ({"patches/source": None}, r"missing key 'patches\.source'"),
        ({"memory/explicit_padding": True}, r"memory\.explicit_padding: expected a text, got True"),
        ({"memory/storage": "zip"}, r"memory\.storage: expected one of c_arrays, tflite, got 'zip'"),
    ],
)
def test_wrong_runtime_properties_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidProfile, match=message):
        load_device(write(tmp_path, change))
