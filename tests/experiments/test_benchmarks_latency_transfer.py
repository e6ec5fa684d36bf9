"""The transfer benchmark on small tables made up here: what it reads, what it refuses, how it scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pandas as pd
import pytest

ARGUMENTS = ("--architecture-columns", "op_*", "--samples", "6", "--draws", "2")


@pytest.fixture
def script(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("latency_transfer")


@pytest.fixture
def frame(rng: np.random.Generator) -> pd.DataFrame:
    """300 architectures of five operators, sums of operator costs on five devices, two of them of one machine."""
    codes = rng.integers(0, 4, size=(300, 5))
    names = np.array(["skip", "conv", "pool", "wide"])
    table = pd.DataFrame({f"op_{i}": names[codes[:, i]] for i in range(5)})
    table.insert(0, "arch_idx", np.arange(300))
    costs = {
        "cpu": [1, 8, 3, 9],
        "phone": [1, 9, 2, 9],
        "gpu_1": [3, 4, 4, 5],
        "gpu_32": [2, 4, 4, 6],
        "npu": [1, 9, 5, 8],
    }
    for name, cost in costs.items():
        table[name] = (2 + np.array(cost)[codes].sum(axis=1)) * np.exp(0.01 * rng.normal(size=300))
    table["macs"] = np.array([1, 9, 2, 18])[codes].sum(axis=1)
    return table


def written(folder: Path, frame: pd.DataFrame, name: str = "table.csv.gz") -> str:
    frame.to_csv(folder / name, index=False)
    return str(folder / name)


def test_leaves_each_device_out(
    script: ModuleType, frame: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert script.main(["--table", written(tmp_path, frame), *ARGUMENTS, "--json", "--out", str(out)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert json.loads(out.read_text()) == result
    assert result["source_devices"] == result["target_devices"] == ["cpu", "phone", "gpu_1", "gpu_32", "npu"]
    assert result["leave_one_out"] and result["seeds"] == [0, 1]
    methods = result["methods"]
    assert {"ours", "ours_random_samples", "ours_strict", "ours_pool_sources", "macs", "count"} <= set(methods)
    for told in methods.values():
        assert {"spearman_mean", "spearman_std", "spearman_untrimmed_mean", "within_10pct"} <= set(told)
        by_device = [device["spearman_mean"] for device in told["devices"].values()]
        assert told["spearman_mean"] == pytest.approx(np.mean(by_device), abs=1e-3)
    assert methods["ours"]["spearman_mean"] > max(0.9, methods["macs"]["spearman_mean"])
    assert methods["ours"]["within_10pct"] > 0.75 and 0.5 < methods["ours"]["coverage"] <= 1
    assert (
        result["targets"]["gpu_1"] | {"known": 4, "known_strict": 3, "pool": 142, "queries": 158}
        == (result["targets"]["gpu_1"])
    )
    assert str(tmp_path) not in json.dumps(result)


def test_named_devices_and_a_joined_table(
    script: ModuleType, frame: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    operators = written(tmp_path, frame[["arch_idx", *(f"op_{i}" for i in range(5))]], "operators.csv")
    latency = written(tmp_path, frame[["arch_idx", "cpu", "phone", "npu"]])
    long = frame.melt(["arch_idx"], ["gpu_1"], var_name="device", value_name="ms").sample(frac=0.8, random_state=0)
    joins = ["--join", operators, "--join", written(tmp_path, long, "long.csv"), "--on", "arch_idx"]
    turned = ["--device-column", "device", "--latency-column", "ms"]
    devices = ["--source-devices", "cpu,phone", "--target-devices", "gpu_1"]
    assert script.main(["--table", latency, *joins, *turned, *devices, *ARGUMENTS, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["target_devices"] == ["gpu_1"] and result["source_devices"] == ["cpu", "phone"]
    assert result["targets"]["gpu_1"]["pool"] == 240 * 900 // 1900
    assert "macs" not in result["methods"] and "count" in result["methods"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--source-devices", "cpu,toaster"], "no device column 'toaster'"),
        (["--architecture-columns", "layer_*"], "no architecture column matches 'layer_*'"),
        (["--macs-column", "flops"], "no column 'flops' of MACs"),
        (["--samples", "80"], "expected at least 160 in the pool"),
        (["--samples", "2"], "at least 4 samples"),
        (["--source-devices", "cpu"], "no known device is left for cpu"),
        (["--join", "other.csv"], "cannot be read as CSV"),
    ],
)
def test_bad_input_is_one_line(
    script: ModuleType,
    frame: pd.DataFrame,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert script.main(["--table", written(tmp_path, frame), *ARGUMENTS, *arguments]) == 2
    told = capsys.readouterr()
    assert not told.out and told.err.count("\n") == 1 and said in told.err


def test_negative_latencies_are_refused(
    script: ModuleType, frame: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame.loc[3, "npu"] = -1.0
    assert script.main(["--table", written(tmp_path, frame), *ARGUMENTS]) == 2
    assert "got others in npu" in capsys.readouterr().err


def test_a_devices_own_table_is_not_fitted_on_what_is_asked(script: ModuleType, rng: np.random.Generator) -> None:
    codes = rng.integers(0, 3, size=(200, 3))
    latency_ms = np.exp(rng.normal(size=(3, 3))[codes, np.arange(3)].sum(axis=1, keepdims=True))
    split = script.Split(np.arange(90), np.arange(90, 190))  # and ten of neither
    found = []
    for part in (split.queries, np.arange(190, 200)):
        changed = latency_ms.copy()
        changed[part] *= rng.uniform(2, 9, size=(len(part), 1))
        for measured in (latency_ms, changed):
            table = script.Table(codes, (3,) * 3, (("a", "b", "c"),) * 3, ("it",), measured, None)
            found.append(script.own_table(script.Task(table, split, 0, np.arange(0), 0, 6))[0])
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[0], latency_ms[split.queries, 0], rtol=0.02)
    assert not np.allclose(found[2], found[3], rtol=0.02)


def test_scores(script: ModuleType) -> None:
    actual = np.arange(1.0, 21.0)
    assert script.trimmed(actual[::-1]).tolist() == list(range(17, 1, -1))
    predicted = actual.copy()
    predicted[[0, 19]] = [40.0, 0.5]  # wrong only where the trimmed correlation does not look
    found = script.scored((predicted, predicted, predicted > 1), actual)
    assert found["spearman"] == pytest.approx(1.0) and found["spearman_untrimmed"] < 0.5
    assert found["within_10pct"] == pytest.approx(18 / 20) and found["coverage"] == pytest.approx(19 / 20)
    assert script.spearman(np.ones(20), actual) == 0.0


def test_deviation_is_over_draws_of_the_mean_over_devices(script: ModuleType) -> None:
    def draw(value: float) -> dict[str, float]:
        return {"spearman": value, "spearman_untrimmed": value, "within_10pct": 0.5}

    told = script.summary({"a": [draw(0.2), draw(0.4)], "b": [draw(0.8), draw(0.6)]})
    assert told["spearman_mean"] == 0.5 and told["spearman_std"] == 0.0
    assert told["devices"]["a"]["spearman_std"] == pytest.approx(0.1)


def test_coarse_clocks(script: ModuleType, rng: np.random.Generator) -> None:
    fine = rng.uniform(5, 40, size=2000)
    assert script.resolution_of(fine) is None
    assert script.resolution_of(np.round(fine)) == 1.0
    assert script.resolution_of(np.round(fine / 0.5) * 0.5) == pytest.approx(0.5)
    assert script.rounding_ceiling(fine, 1e-6) == pytest.approx(1.0)
    assert 0.9 < script.rounding_ceiling(rng.uniform(5, 12, size=2000), 1.0) < 0.995


def test_numbers_of_many_values_are_cut_into_bins(script: ModuleType) -> None:
    codes, labels = script.coded_column(pd.Series(np.arange(1600) / 7))
    assert len(labels) == 16 and np.bincount(codes).tolist() == [100] * 16
    codes, labels = script.coded_column(pd.Series([4, 2, 4, 8]))
    assert codes.tolist() == [1, 0, 1, 2] and labels == ("2", "4", "8")


@pytest.mark.slow
def test_beats_help_and_macs_on_nas_bench_201(
    script: ModuleType, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, operators = data_folder / "nasbench201_latency_ms.csv.gz", data_folder / "nasbench201_cifar10.csv.gz"
    arguments = ["--table", str(table), "--join", str(operators), "--on", "arch_idx", "--architecture-columns", "op_*"]
    assert script.main([*arguments, "--samples", "10", "--draws", "1", "--json"]) == 0
    methods = json.loads(capsys.readouterr().out)["methods"]
    assert methods["ours"]["spearman_mean"] > 0.95 > 0.8 > methods["macs"]["spearman_mean"]
    assert 0.8 < methods["ours"]["coverage"] < 0.98


def test_a_numeric_column_may_be_the_single_number_even_of_devices_with_architectures_of_their_own(
    script: ModuleType, rng: np.random.Generator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pd.DataFrame({"depth": rng.integers(1, 7, 600), "heads": rng.integers(1, 31, 600)})
    rows["wide"] = rng.choice(["yes", "no"], 600)
    rows["device"] = np.repeat(["a", "b", "c"], 200)
    rows["ms"] = (10 * rows["depth"] - 0.02 * rows["heads"] + (rows["wide"] == "yes")) * rng.uniform(0.99, 1.01, 600)
    columns = ["--architecture-columns", "depth,heads,wide", "--device-column", "device", "--latency-column", "ms"]
    arguments = ["--table", written(tmp_path, rows), *columns, "--samples", "6", "--draws", "1", "--json"]
    assert script.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert {told["counted"] for told in result["targets"].values()} == {"choice 0"}
    assert result["methods"]["count"]["spearman_untrimmed_mean"] > 0.9


def test_a_word_among_latencies_is_refused_with_its_line_and_a_table_without_rows_too(
    script: ModuleType, frame: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content, said in (
        (frame.astype({"npu": object}), "line 9: npu: expected a number, got 'abc'"),
        (frame.iloc[:0], "has a header and no rows"),
    ):
        if len(content):
            content.loc[7, "npu"] = "abc"
        assert script.main(["--table", written(tmp_path, content, "bad.csv"), *ARGUMENTS]) == 2
        told = capsys.readouterr()
        assert not told.out and told.err.count("\n") == 1 and said in told.err
    content = frame.astype({"npu": object})
    content.loc[7, "npu"] = "abc"  # of a device that nobody asks for
    named = ["--source-devices", "cpu,phone,gpu_1", "--json"]
    assert script.main(["--table", written(tmp_path, content, "bad.csv"), *ARGUMENTS, *named]) == 0
