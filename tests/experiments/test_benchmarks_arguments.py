"""The benchmarks of latencies and memory on small files made here: files, columns and devices as arguments."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

Load = Callable[[str], ModuleType]
Run = Callable[..., dict[str, Any]]
Refuse = Callable[..., str]
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
EDGES = ("0to1", "0to2", "1to2", "0to3", "1to3", "2to3")


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """No folder of measurements is known, so that a file that no option names is not found by chance."""
    monkeypatch.delenv("FITNEST_DATA", raising=False)


@pytest.fixture
def run(load_benchmark: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Name of a benchmark and its arguments -> the JSON that it prints and writes."""

    def called(name: str, *arguments: object) -> dict[str, Any]:
        out = tmp_path / "result.json"
        assert load_benchmark(name).main([*map(str, arguments), "--out", str(out)]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads(out.read_text())
        return dict(printed)

    return called


@pytest.fixture
def refused(load_benchmark: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Refuse:
    """Name of a benchmark and its arguments -> the one line that it tells."""

    def called(name: str, *arguments: object) -> str:
        out = tmp_path / "none.json"
        assert load_benchmark(name).main([*map(str, arguments), "--out", str(out)]) == 2
        told = capsys.readouterr()
        assert not told.out and not out.exists()
        assert told.err.startswith(f"{name}: ") and told.err.count("\n") == 1
        return told.err

    return called


def scaled_line(number: np.ndarray, measured: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """At all rows, the line through those of `fitted` of least squared relative error; its prices are positive."""
    line = np.column_stack([number, np.ones(len(number))])
    prices = np.linalg.lstsq(line[fitted] / measured[fitted, None], np.ones(len(line[fitted])), rcond=None)[0]
    assert (prices >= 0).all()
    return line @ prices


# cells ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cells(rng: np.random.Generator) -> pd.DataFrame:
    """80 cells with a convolution from input to output, MACs, and what two devices take for them."""
    codes = rng.integers(0, 5, (80, 6))
    codes[:, 3] = rng.integers(2, 4, 80)
    frame = pd.DataFrame(codes, columns=[f"op_{edge}" for edge in EDGES])
    frame.insert(0, "arch_idx", rng.permutation(80) + 100)
    frame["macs_cifar10"] = 8_000_000 + 400_000 * codes.sum(axis=1)
    for device, factor in (("gpu", 1.0), ("cpu", 3.0)):
        frame[device] = (factor * (2 + 2e-7 * frame["macs_cifar10"]) * rng.lognormal(0, 0.1, 80)).round(4)
    return frame


@pytest.fixture
def files(cells: pd.DataFrame, tmp_path: Path) -> Callable[..., list[object]]:
    """Whether latencies have one column a device, and changed cells -> the arguments that name two files."""

    def written(wide: bool = False, **changed: object) -> list[object]:
        latency = cells[["arch_idx", "cpu", "gpu"]]
        if not wide:
            latency = latency.melt("arch_idx", var_name="device", value_name="latency_ms")
        latency.to_csv(tmp_path / "latency.csv.gz", index=False)
        cells.drop(columns=["cpu", "gpu"]).assign(**changed).to_csv(tmp_path / "cells.csv", index=False)
        table, other = tmp_path / "latency.csv.gz", tmp_path / "cells.csv"
        return ["--table", table, "--cells", other, "--samples", "30", "--draws", "3", "--seed", "5"]

    return written


def test_the_baseline_of_cells_is_a_line_through_their_macs(
    run: Run, files: Callable[..., list[object]], cells: pd.DataFrame
) -> None:
    devices = run("mobile_nasbench201", *files())["devices"]
    assert list(devices) == ["cpu", "gpu"]
    macs = cells["macs_cifar10"].to_numpy(float)
    for device, told in devices.items():
        measured, expected = cells[device].to_numpy(), []
        for draw in range(3):
            sample = np.isin(np.arange(80), np.random.default_rng((5, draw)).choice(80, 30, replace=False))
            error = np.abs(scaled_line(macs, measured, sample) / measured - 1)[~sample]
            expected.append(error.mean())
        assert told["networks"] == 80 and told["judged"] == 50
        # a ridge of 1e-4 holds the line, too
        assert told["methods"]["macs_only"]["mape"]["mean"] == pytest.approx(np.mean(expected), rel=0.01)
        assert "ours" in told["methods"]


def test_a_column_a_device_or_a_row_a_measurement_are_the_same(run: Run, files: Callable[..., list[object]]) -> None:
    rows = run("mobile_nasbench201", *files())["devices"]
    columns = run("mobile_nasbench201", *files(wide=True))["devices"]
    assert rows == columns
    assert run("mobile_nasbench201", *files(wide=True), "--devices", "gpu")["devices"] == {"gpu": rows["gpu"]}
    assert run("mobile_nasbench201", *files(), "--devices", "gpu")["devices"] == {"gpu": rows["gpu"]}


def test_operations_by_name_and_columns_of_other_names(
    run: Run, files: Callable[..., list[object]], cells: pd.DataFrame, tmp_path: Path
) -> None:
    expected = run("mobile_nasbench201", *files())["devices"]["gpu"]
    edges = {f"op_{edge}": f"edge{i}" for i, edge in enumerate(EDGES)}
    one = cells.rename(columns={**edges, "arch_idx": "cell", "macs_cifar10": "work", "gpu": "ms"}).drop(columns="cpu")
    for column in edges.values():
        one[column] = np.array(OPERATIONS)[one[column]]
    one.assign(board="tv").to_csv(tmp_path / "one.csv", index=False)
    columns = ["--on", "cell", "--architecture-columns", "edge*", "--macs-column", "work"]
    columns += ["--device-column", "board", "--latency-column", "ms"]
    arguments = [tmp_path / "one.csv", *columns, "--samples", "30", "--draws", "3", "--seed", "5"]
    assert run("mobile_nasbench201", "--table", *arguments)["devices"] == {"tv": expected}


def test_cells_that_no_path_goes_through_are_counted_and_left_out(
    run: Run, files: Callable[..., list[object]], cells: pd.DataFrame
) -> None:
    assert "without_path" not in run("mobile_nasbench201", *files())["devices"]["gpu"]
    broken = cells[["op_0to3", "op_1to3", "op_2to3"]].copy()
    broken.iloc[:7] = 0
    told = run("mobile_nasbench201", *files(**dict(broken.items())))["devices"]["gpu"]
    assert told["without_path"] == 7 and told["networks"] == 73


@pytest.mark.parametrize(
    ("wide", "arguments", "said"),
    [
        (False, ["--devices", "gpu,toaster"], "no device 'toaster'; devices are cpu, gpu"),
        (True, ["--devices", "toaster"], "no device 'toaster'; devices are cpu, gpu"),
        (False, ["--latency-column", "seconds"], "no column 'seconds'"),
        (False, ["--device-column", "board"], "no column 'board'"),
        (False, ["--on", "cell"], "no column 'cell'"),
        (False, ["--macs-column", "flops"], "no column 'flops' of MACs"),
        (False, ["--architecture-columns", "edge*"], "no architecture column matches 'edge*'"),
        (False, ["--architecture-columns", "op_0*,op_1*"], "expected six architecture columns"),
        (False, ["--architecture-columns", "op_0*,op_1*,op_2*"], "0to1, 0to2, 1to2, 0to3, 1to3, 2to3 in this order"),
        (False, ["--samples", "80"], "cpu ran 80 networks; expected more than 80 samples"),
        (False, ["--samples", "5"], "expected at least 20 samples"),
        (False, ["--table", "nowhere.csv"], "nowhere.csv cannot be read as CSV"),
        (False, ["--cells", "nowhere.csv"], "nowhere.csv cannot be read as CSV"),
    ],
)
def test_what_cannot_be_done_with_cells(
    refused: Refuse, files: Callable[..., list[object]], wide: bool, arguments: list[str], said: str
) -> None:
    assert said in refused("mobile_nasbench201", *files(wide=wide), *arguments)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"op_1to2": 7}, "op_1to2 is '7'; expected one of 0, 1, 2, 3, 4, none"),
        ({"macs_cifar10": 0}, "expected positive numbers in macs_cifar10, got '0'"),
        ({"arch_idx": range(80)}, "no row with arch_idx"),
        ({"arch_idx": 100}, "several cells have arch_idx '100'"),
    ],
)
def test_cells_that_cannot_be_used(
    refused: Refuse, files: Callable[..., list[object]], changed: dict[str, object], said: str
) -> None:
    assert said in refused("mobile_nasbench201", *files(**changed))


def test_a_table_of_cells_without_macs_has_no_baseline(
    refused: Refuse, files: Callable[..., list[object]], tmp_path: Path
) -> None:
    arguments = files()
    pd.read_csv(tmp_path / "cells.csv").drop(columns="macs_cifar10").to_csv(tmp_path / "cells.csv", index=False)
    assert "no column of MACs, which the baseline needs" in refused("mobile_nasbench201", *arguments)


def test_files_of_a_folder(
    run: Run, refused: Refuse, files: Callable[..., list[object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder has the rest of the files with --data, and all of them, or none, by the variable."""
    arguments = files()
    expected, rest = run("mobile_nasbench201", *arguments)["devices"], arguments[4:]
    (tmp_path / "latency.csv.gz").rename(tmp_path / "mobile_nasbench201_latency.csv.gz")
    assert run("mobile_nasbench201", *arguments[2:], "--data", tmp_path)["devices"] == expected
    assert "name the files (--table, --cells), or their folder" in refused("mobile_nasbench201", *rest)
    monkeypatch.setenv("FITNEST_DATA", str(tmp_path))
    assert "nasbench201_cifar10.csv.gz cannot be read" in refused("mobile_nasbench201", *rest)
    assert "expected --table" in refused("mobile_nasbench201", *arguments[2:])
    pd.read_csv(tmp_path / "cells.csv").to_csv(tmp_path / "nasbench201_cifar10.csv.gz", index=False)
    assert run("mobile_nasbench201", *rest)["devices"] == expected


# phones --------------------------------------------------------------------------------------------------


@pytest.fixture
def phones(rng: np.random.Generator, tmp_path: Path) -> list[object]:
    """Seven networks of two convolutions on two devices, one of them run twice, and the arguments that name them."""
    (tmp_path / "graphs").mkdir()
    rows = []
    for number in range(7):
        width = 8 * 2**number
        (tmp_path / "graphs" / f"net{number}.param").write_text(
            "7767517\n3 3\nInput data 0 1 data 0=32 1=32 2=3\n"
            f"Convolution first 1 1 data first 0={width} 1=3 3=2 4=1 5=1 6={27 * width}\n"
            f"Convolution second 1 1 first second 0={width} 1=1 5=1 6={width**2}\n"
        )
        milliseconds = (1 + width + width**2 / 50) * rng.lognormal(0, 0.03, 4)
        devices = ("Board A (Mali)", "Board A (Mali)", "Board B", "Board C")
        rows += [(f"net{number}", device, ms) for device, ms in zip(devices, milliseconds, strict=True)]
    pd.DataFrame(rows, columns=["network", "where", "ms"]).to_csv(tmp_path / "phones.csv", index=False)
    columns = ["--architecture-columns", "network", "--device-column", "where", "--latency-column", "ms"]
    return ["--table", tmp_path / "phones.csv", "--graphs", tmp_path / "graphs", *columns]


def test_devices_by_what_their_rows_contain(run: Run, phones: list[object], tmp_path: Path) -> None:
    found = run("phone_networks", *phones, "--devices", "a=Board A,b=Board B")
    assert found["networks"] == [f"net{number}" for number in range(7)]
    assert {name: told["device"] for name, told in found["gpus_of_the_table"].items()} == {
        "a": "Board A (Mali)",
        "b": "Board B",
    }
    # each network's fastest run, and its MACs: 16x16 outputs of 27 products and of `width` products
    table = pd.read_csv(tmp_path / "phones.csv")
    width = 8 * 2.0 ** np.arange(7)
    macs = 256 * (27 * width + width**2)
    for name, device in (("a", "Board A (Mali)"), ("b", "Board B")):
        measured = table[table["where"] == device].groupby("network")["ms"].min().to_numpy()
        left_out = [scaled_line(macs, measured, np.arange(7) != out)[out] for out in range(7)]
        told = found["methods"]["macs_only"]["gpus"][name]
        assert told["mape"] == pytest.approx(np.abs(left_out / measured - 1).mean())
        assert found["methods"]["pooled"]["gpus"][name]["networks"] == 7


def test_vulkan_and_floats_are_taken_where_the_table_tells(run: Run, phones: list[object], tmp_path: Path) -> None:
    expected = run("phone_networks", *phones, "--devices", "b=Board B")
    table = pd.read_csv(tmp_path / "phones.csv").assign(backend="gpu_vulkan", precision="fp")
    others = [table.assign(backend="cpu", ms=0.1), table.assign(precision="int8", ms=0.2)]
    pd.concat([table, *others]).to_csv(tmp_path / "phones.csv", index=False)
    assert run("phone_networks", *phones, "--devices", "b=Board B")["methods"] == expected["methods"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "toaster"], "no device 'toaster'; expected NAME=PATTERN or one of adreno430,"),
        (["--devices", "toaster=Crumb"], "no rows of toaster ('Crumb')"),
        (["--devices", "a=Board A,a=Board B"], "--devices has 'a' twice"),
        ([], "no rows of adreno430"),
        (["--latency-column", "seconds"], "no column 'seconds'; columns are network, where, ms"),
        (["--architecture-columns", "network,where"], "--architecture-columns 'network,where': expected 1"),
        (["--table", "nowhere.csv"], "nowhere.csv cannot be read as CSV"),
        (["--graphs", "nowhere", "--devices", "b=Board B"], "the graph of net0 cannot be used"),
    ],
)
def test_what_cannot_be_done_with_phones(
    refused: Refuse, phones: list[object], arguments: list[str], said: str
) -> None:
    assert said in refused("phone_networks", *phones, *arguments)


def test_devices_that_do_not_follow_the_macs_are_told(refused: Refuse, phones: list[object], tmp_path: Path) -> None:
    table = pd.read_csv(tmp_path / "phones.csv")
    table.assign(ms=1 / table["ms"]).to_csv(tmp_path / "phones.csv", index=False)
    assert "the latencies of b hardly follow the MACs" in refused("phone_networks", *phones, "--devices", "b=Board B")
    table[table["network"] < "net2"].to_csv(tmp_path / "phones.csv", index=False)
    assert "b ran 2 networks; expected at least 3" in refused("phone_networks", *phones, "--devices", "b=Board B")


def test_graphs_are_needed_beside_a_table(refused: Refuse, phones: list[object]) -> None:
    assert "expected both --table and --graphs" in refused("phone_networks", *phones[:2])


# microcontrollers ----------------------------------------------------------------------------------------


def structure(widths: Sequence[int]) -> dict[str, Any]:
    """A network as MCUNet's JSON files hold one."""

    def block(channels: int, width: int) -> dict[str, Any]:
        body = {"name": "MBInvertedConvLayer", "in_channels": channels, "out_channels": width}
        body |= {"kernel_size": 3, "stride": 2, "expand_ratio": 4}
        return {"mobile_inverted_conv": body, "shortcut": None}

    return {
        "first_conv": {"in_channels": 3, "out_channels": widths[0], "kernel_size": 3, "stride": 2},
        "blocks": [block(*pair) for pair in pairwise(widths)],
        "feature_mix_layer": None,
        "classifier": {"in_features": widths[-1], "out_features": 10},
    }


@pytest.fixture
def zoo(load_script: Load, tmp_path: Path, rng: np.random.Generator) -> Mapping[str, Any]:
    """Structures of the networks that are known, in a folder; the networks by name."""
    known = load_script("mcu_data")
    (tmp_path / "zoo").mkdir()
    for number, file in enumerate(sorted({file for file, _, _ in known.ROWS.values()})):
        made = structure((8 + 2 * number, 16, 24 + int(rng.integers(16)), 40))
        (tmp_path / "zoo" / f"{file}.json").write_text(json.dumps(made))
    return dict(known.zoo_networks(tmp_path / "zoo", known.ROWS))


@pytest.fixture
def h743(zoo: Mapping[str, Any], tmp_path: Path, rng: np.random.Generator) -> list[object]:
    """What three libraries take for those networks, in columns of other names, and the arguments that name them."""
    rows = []
    for library, speed in (("tflite_micro", 20.0), ("cmsis_nn", 2.0), ("tinyengine", 1.0), ("unheard_of", 1.0)):
        for name, network in zoo.items():
            noise = rng.lognormal(0, 0.1, 3)
            figures = noise * [speed * 1e-5 * network.macs, 40 + 3e-5 * network.macs, 300 + 2e-5 * network.macs]
            rows.append((name, library, *figures))
    rows.append(("nobody", "cmsis_nn", 1.0, 1.0, 1.0))
    frame = pd.DataFrame(rows, columns=["network", "runtime", "ms", "ram", "rom"])
    frame.to_csv(tmp_path / "h743.csv", index=False)
    return ["--h743", tmp_path / "h743.csv", "--structures", tmp_path / "zoo"]


OF_LATENCY = ("--architecture-columns", "network", "--device-columns", "runtime", "--latency-columns", "ms")
OF_MEMORY = ("--architecture-columns", "network", "--device-column", "runtime", "--memory-columns", "ram,rom")


def test_one_table_of_microcontrollers_will_do(run: Run, h743: list[object], zoo: Mapping[str, Any]) -> None:
    found = run("mcu_latency", *h743, *OF_LATENCY)
    assert list(found["latency"]) == ["tflm-reference", "tinyengine", "cmsis-nn"]
    assert found["measurements"] == 24 and found["energy"] == {} and found["energy_coverage_of_all"] is None
    for told in found["latency"].values():
        assert told["measurements"] == 8 and told["architectures"] == 7
        assert 0 < told["macs_only"]["mape"] < 0.2
    networks = found["latency"]["tinyengine"]["boards"]["stm32h743 TinyEngine"]["networks"]
    assert {name: row["macs"] for name, row in networks.items()} == {name: n.macs for name, n in zoo.items()}


def test_boards_or_kernels_of_microcontrollers(run: Run, h743: list[object]) -> None:
    every = run("mcu_latency", *h743, *OF_LATENCY)["latency"]
    found = run("mcu_latency", *h743, *OF_LATENCY, "--devices", "stm32h743 TinyEngine,cmsis-nn")
    assert found["latency"] == {kernels: every[kernels] for kernels in ("tinyengine", "cmsis-nn")}
    assert list(found["sensitivity"]) == ["cmsis-nn"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "toaster"], "no device 'toaster'; devices are tflm-reference, cmsis-nn, tinyengine, stm32h743"),
        (["--latency-columns", "seconds"], "no column 'seconds'"),
        (["--latency-columns", "ms,ms"], "--latency-columns 'ms,ms': expected 1 separated by commas (latency_ms)"),
        (["--architecture-columns", "ms"], "no measurement of a known network on a known board"),
        (["--structures", "nowhere"], "the structure of mcunet-in0 cannot be used"),
        (["--h743", "nowhere.csv"], "nowhere.csv cannot be read as CSV"),
        (["--mlperf", "nowhere.csv"], "expected both --mlperf and --models"),
    ],
)
def test_what_cannot_be_done_with_microcontrollers(
    refused: Refuse, h743: list[object], arguments: list[str], said: str
) -> None:
    assert said in refused("mcu_latency", *h743, *OF_LATENCY, *arguments)


def test_a_board_needs_a_network_beside_the_one_left_out(refused: Refuse, h743: list[object], tmp_path: Path) -> None:
    table = pd.read_csv(tmp_path / "h743.csv")
    table[table["network"].str.startswith("proxyless")].to_csv(tmp_path / "h743.csv", index=False)
    told = refused("mcu_latency", *h743, *OF_LATENCY)
    assert "stm32h743 TFLM has the latency of 1 architecture; expected at least 2" in told


def test_boards_of_mlperf_alone_with_energy(run: Run, refused: Refuse, data_folder: Path, tmp_path: Path) -> None:
    names = {"task": "net", "round": "r", "submitter": "by", "system": "s", "latency_ms": "ms"}
    table = pd.read_csv(data_folder / "mcu_mlperf_tiny.csv").rename(columns={**names, "energy_uJ_per_inf": "uJ"})
    table.to_csv(tmp_path / "mlperf.csv", index=False)
    files = ["--mlperf", tmp_path / "mlperf.csv", "--models", data_folder / "mlperf_tiny_models"]
    columns = ["--architecture-columns", "net", "--device-columns", "r,by,s", "--latency-columns", "ms"]
    arguments = [*files, *columns, "--devices", "x-cube-ai-7"]
    found = run("mcu_latency", *arguments, "--energy-column", "uJ")
    assert list(found["latency"]) == ["x-cube-ai-7"] and found["latency"]["x-cube-ai-7"]["measurements"] == 24
    assert found["energy"]["x-cube-ai-7"]["macs_only"]["mape"] > found["energy"]["x-cube-ai-7"]["ours"]["mape"]
    assert run("mcu_latency", *arguments)["energy"] == {}
    assert "no column 'joules'" in refused("mcu_latency", *arguments, "--energy-column", "joules")
    assert "expected 3 separated by commas" in refused("mcu_latency", *files, "--device-columns", "r")


def test_the_baseline_of_memory_is_a_line_through_the_macs(
    load_benchmark: Load, h743: list[object], zoo: Mapping[str, Any], tmp_path: Path
) -> None:
    script = load_benchmark("mcu_memory")
    columns = script.H743Columns("network", "runtime", sram="ram", flash="rom")
    found = script.boards(tmp_path / "h743.csv", tmp_path / "zoo", columns)
    assert list(found) == ["tflite_micro", "cmsis_nn", "tinyengine"]
    table = pd.read_csv(tmp_path / "h743.csv").set_index(["runtime", "network"])
    macs = np.array([network.macs for network in zoo.values()], dtype=float)
    architecture = np.array([name.split("-r")[0] for name in zoo])  # two rows are one network at two resolutions
    assert len(set(architecture)) == 7
    for library, told in found.items():
        for figure, column in (("sram", "ram"), ("flash", "rom")):
            measured = 1024 * table.loc[library].loc[list(zoo), column].to_numpy()
            left_out = [scaled_line(macs, measured, architecture != out)[i] for i, out in enumerate(architecture)]
            expected = pytest.approx(np.abs(left_out / measured - 1).mean(), abs=1e-5)
            if library == "tinyengine":
                fitted = np.abs(scaled_line(macs, measured, np.full(8, True)) / measured - 1).mean()
                assert told[f"{figure}_macs_only_mape"] == pytest.approx(fitted, abs=1e-5)
                assert told[f"{figure}_macs_only_left_out_mape"] == expected
            else:
                assert told[figure]["macs_only_left_out_mape"] == expected
                assert told[figure]["left_out_mape"] > 0


def test_libraries_and_columns_of_memory(run: Run, h743: list[object], data_folder: Path) -> None:
    arguments = [*h743, *OF_MEMORY, "--models", data_folder / "mlperf_tiny_models", "--devices", "cmsis_nn"]
    assert list(run("mcu_memory", *arguments)["stm32h743"]) == ["cmsis_nn"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--devices", "toaster"], "no device 'toaster'; devices are tflite_micro, cmsis_nn, tinyengine"),
        (["--memory-columns", "ram,disk"], "no column 'disk'; columns are network, runtime, ms, ram, rom"),
        (["--memory-columns", "ram"], "--memory-columns 'ram': expected 2 separated by commas (sram_kB, flash_kB)"),
        (["--architecture-columns", "net_id"], "no column 'net_id'"),
        (["--structures", "nowhere"], "the structure of mcunet-in0 cannot be used"),
        (["--models", "nowhere"], "nowhere: no file ad01_int8.tflite"),
        (["--h743", "nowhere.csv"], "nowhere.csv cannot be read as CSV"),
    ],
)
def test_what_cannot_be_done_with_memory(
    refused: Refuse, h743: list[object], tmp_path: Path, arguments: list[str], said: str
) -> None:
    for name in ("ad01_int8", "kws_ref_model", "pretrainedResnet_quant", "vww_96_int8"):
        (tmp_path / f"{name}.tflite").touch()
    assert said in refused("mcu_memory", *h743, *OF_MEMORY, "--models", tmp_path, *arguments)


@pytest.mark.parametrize("name", ["phone_networks", "mcu_latency", "mcu_memory"])
def test_an_empty_folder_is_refused(refused: Refuse, tmp_path: Path, name: str) -> None:
    refused(name, "--data", tmp_path)
