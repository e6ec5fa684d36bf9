"""Devices measured by other means: the plan that is written, the CSV file that is read, what the run keeps of it."""

from __future__ import annotations

import csv
import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

from hardware_profiles import load_device
from nas.candidates import Costs
from nas.cli import BAD_INPUT, DONE, main
from nas.config import BadExperiment, DeviceSettings
from nas.costs import Infeasible, ProfiledDevice, at_most, maximize
from nas.limits import reachable
from nas.offline import profile_measured
from nas.pipeline import Run
from nas.profile import informative
from predictors import LatencyPredictor, NewDevicePredictor
from search_spaces import Architecture
from tests.nas import tiny


def true_ms(run: Run, architecture: Architecture) -> float:
    """3 us a layer with weights, 1 ns a MAC in fp32 and 0.4 in int8."""
    layers = run.space.lower(architecture).layers
    return sum(3e-3 * one.has_weights + one.macs * (1e-6 if one.precision.name == "fp32" else 4e-7) for one in layers)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    folder = tmp_path / "run"
    folder.mkdir()
    tiny.write_experiment(tmp_path).rename(folder / "experiment.yaml")
    return Run.open(str(folder))  # as text: a path given as either is opened


@pytest.fixture
def board(tmp_path: Path) -> Path:
    """The file of a device that is measured, without a command."""
    path = tmp_path / "board.yaml"
    path.write_text(tiny.device_yaml("board", latency={"origin": "measured", "source": "by hand"}))
    return path


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def written(path: Path, run: Run, architectures: list[Architecture]) -> Path:
    with path.open("w", newline="") as stream:
        rows = csv.writer(stream)
        rows.writerow(["architecture", "latency_ms"])
        rows.writerows([str(one), true_ms(run, one)] for one in architectures)
    return path


def test_a_plan_is_measured_and_becomes_a_profile(
    run: Run, board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, folder = tmp_path / "plan.csv", tmp_path / "plan_models"
    code, out, _ = call(capsys, "profile", run.folder, "--device", board, "--plan", plan, "--samples", 8)
    assert code == DONE and f"--measurements {plan}" in out
    with plan.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    chosen = [run.space.parse(row["architecture"]) for row in rows]
    assert chosen == informative(run.space, load_device(board), 8, run.experiment.seed)
    assert {row["latency_ms"] for row in rows} == {""}
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{one.id}.onnx" for one in chosen)
    for one in chosen:
        onnx.checker.check_model(onnx.load(folder / f"{one.id}.onnx"))
    assert not (run.folder / "devices").exists()

    code, _, err = call(capsys, "profile", run.folder, "--device", board, "--measurements", plan)
    assert code == BAD_INPUT and "line 2: latency_ms: expected a number above 0, got nothing" in err

    filled = written(plan, run, chosen)
    code, out, err = call(capsys, "profile", run.folder, "--device", board, "--measurements", filled)
    assert code == DONE and f"8 architectures read, all of {run.space.name}" in err
    assert "fitted on 8 measured subnets; held-out median error" in out

    again = Run.open(run.folder)
    assert again.experiment.devices[-1] == DeviceSettings("board")
    monkeypatch.setattr("nas.pipeline.profile", lambda *_, **__: pytest.fail("this machine must not be measured"))
    device = again.devices["board"]
    assert isinstance(device.predictor, NewDevicePredictor)
    assert not device.is_at_hand
    told = device.predictor.provenance
    assert (told["file"], told["sha256"]) == ("plan.csv", hashlib.sha256(filled.read_bytes()).hexdigest())
    assert told["device"] == "board" and told["architectures"] == [one.id for one in chosen]
    rng = np.random.default_rng(0)
    fresh = [run.space.sample(rng) for _ in range(40)]
    predicted = [device.figure(run.space.lower(one), "latency_ms").value for one in fresh]
    assert np.median(np.abs(np.array(predicted) / [true_ms(run, one) for one in fresh] - 1)) < 0.05
    figures = [device.figure(run.space.lower(one), "latency_ms") for one in fresh]
    for value in (min(figure.high or 0.0 for figure in figures), min(predicted) / 9):
        limits = [at_most("latency_ms", value, device, confidence=0.95)]
        costs = Costs(run.space, [maximize("accuracy")], limits, {"board": device})
        if value < min(predicted):
            with pytest.raises(Infeasible, match="what binds is latency_ms@board"):
                reachable(costs)
        else:
            met = device.figure(run.space.lower(reachable(costs).architecture), "latency_ms")
            assert met.high is not None and met.high <= value
    with pytest.raises(BadExperiment, match=r"profiled on the measurements in plan\.csv; give --measurements again"):
        again.profile(DeviceSettings(str(board)))


@pytest.mark.parametrize("count", [10, 60])
@pytest.mark.parametrize("kind", ["mcu", "cpu", "gpu"])
def test_latencies_in_seconds_are_doubted_and_milliseconds_are_not(
    count: int, kind: str, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A small network takes 0.1 ms on a CPU, a tenth of that on a GPU, and ten seconds on a slow microcontroller."""
    path = tmp_path / "one.yaml"
    path.write_text(tiny.device_yaml("one", kind=kind, latency={"origin": "measured", "source": "by hand"}))
    device, rng = load_device(path), np.random.default_rng(3)
    chosen = list(dict.fromkeys(run.space.sample(rng) for _ in range(4 * count)))[:count]
    macs_per_s = {"mcu": 3e7, "cpu": 2e10, "gpu": 1e11}[kind]
    for factor, doubted in ((1.0, False), (1e-3, True)):
        caplog.clear()
        table = tmp_path / f"{factor}.csv"
        with table.open("w", newline="") as stream:
            rows = csv.writer(stream)
            rows.writerow(["architecture", "latency_ms"])
            rows.writerows([str(a), factor * 1000 * run.space.lower(a).macs / macs_per_s] for a in chosen)
        profile_measured(run.space, device, table, seed=0)
        assert ("were these in seconds?" in caplog.text) == doubted


def test_many_measurements_are_fitted_alone(run: Run, board: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    many = list(dict.fromkeys(run.space.sample(rng) for _ in range(100)))[:60]
    _, device = run.profile_measured(DeviceSettings(str(board)), written(tmp_path / "many.csv", run, many))
    assert isinstance(device.predictor, LatencyPredictor)
    assert device.predictor.report()["networks"] == 60 and device.predictor.report()["median_error"] < 0.02
    held = json.loads((run.folder / "devices" / "board.for.json").read_text())
    assert held["measurements"]["file"] == "many.csv" and held["space"] == run.space.name


@pytest.mark.parametrize("count", [10, 60])
def test_equal_latencies_have_no_rank_correlation(
    count: int, run: Run, board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(1)
    some = list(dict.fromkeys(run.space.sample(rng) for _ in range(100)))[:count]
    path = tmp_path / "equal.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([("architecture", "latency_ms"), *((str(one), 3.0) for one in some)])
    code, out, err = call(capsys, "profile", run.folder, "--device", board, "--measurements", path)
    assert code == DONE and "rank correlation not defined (all latencies or all predictions are equal)" in out
    assert f"all {count} networks take 3 ms, whatever their size" in err
    report = json.loads((run.folder / "devices" / "board.json").read_text())["report"]
    assert report["networks"] == count and report["spearman"] is None


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("depth=7", "1.0")], "line 2: architecture: "),
        ([("", "1.0")], "line 2: expected an architecture or an id"),
        ([(None, "-3"), (None, "2.0")], "line 2: latency_ms: expected a number above 0, got '-3'"),
        ([(None, "nan"), (None, "2.0")], "(1 of 2 rows are measurements of mobilenet"),
        ([(None, "1.0"), (None, "2.0")], "1 architectures are too few; expected 4, better ten"),
    ],
)
def test_bad_measurements_are_refused_by_line(
    rows: list[tuple[str | None, str]],
    said: str,
    run: Run,
    board: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "bad.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["architecture", "latency_ms"])
        writer.writerows([str(run.space.largest) if text is None else text, number] for text, number in rows)
    code, out, err = call(capsys, "profile", run.folder, "--device", board, "--measurements", path)
    assert code == BAD_INPUT and said in err and out == "" and "Traceback" not in err
    assert not (run.folder / "devices").exists()


def test_what_cannot_be_is_refused(run: Run, board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(said: str, device: object, *arguments: object) -> None:
        code, out, err = call(capsys, "profile", run.folder, "--device", device, *arguments)
        assert code == BAD_INPUT and said in err and out == "", err

    rng = np.random.default_rng(1)
    path = written(
        tmp_path / "some.csv", run, [run.space.with_precision(run.space.sample(rng), "fp32") for _ in "1234567"]
    )
    refused("only a device file with 'origin: measured' takes measurements", "adreno540", "--measurements", path)
    refused("--samples says what to measure", board, "--measurements", path, "--samples", 10)
    refused("may hold measurements; give another name", board, "--plan", path)
    refused("3 samples are too few", board, "--plan", tmp_path / "new.csv", "--samples", 3)
    document: dict[str, Any] = yaml.safe_load(board.read_text())
    document["precisions"]["value"] = {kind: ["int8"] for kind in document["precisions"]["value"]}
    board.write_text(yaml.safe_dump(document))
    refused("board cannot run", board, "--measurements", path)
    assert (
        call(capsys, "profile", run.folder, "--device", board, "--measurements", tmp_path / "none.csv")[0] == BAD_INPUT
    )


def test_a_device_of_a_file_is_not_this_machine(board: Path) -> None:
    assert not ProfiledDevice(load_device(board)).is_at_hand and ProfiledDevice(load_device("host-cpu")).is_at_hand


def test_a_device_without_a_command_is_not_measured_here(
    run: Run, board: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("nas.profile")
    monkeypatch.setattr(module, "measure", lambda *_, **__: pytest.fail("this machine must not be measured"))
    code, _, err = call(capsys, "profile", run.folder, "--device", board)
    assert code == BAD_INPUT and "board is not this machine, and its file names no command" in err


def test_a_file_with_the_name_of_a_shipped_device_is_refused(
    run: Run, board: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board.write_text(board.read_text().replace("name: board", "name: host-cpu"))
    code, _, err = call(capsys, "profile", run.folder, "--device", board)
    assert code == BAD_INPUT and "the name 'host-cpu' is that of a shipped device" in err


def test_a_device_whose_command_changed_is_measured_again(
    run: Run, board: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document: dict[str, Any] = yaml.safe_load(board.read_text())
    found: list[list[float]] = []
    for milliseconds in (3, 7):
        document["latency"] = {"origin": "measured", "source": "made up", "repeats": 1, "anchor": False}
        script = f"import os, sys; print({milliseconds} * os.path.getsize(sys.argv[1]))"
        document["latency"]["command"] = f"{sys.executable} -c '{script}' {{model}}"
        board.write_text(yaml.safe_dump(document))
        assert call(capsys, "profile", run.folder, "--device", board, "--samples", 5)[0] == DONE
        record = json.loads((run.folder / "devices" / "board.measured.json").read_text())
        assert all(one["latency_ms"] % milliseconds == 0 for one in record["measurements"].values())
        found.append(sorted(one["latency_ms"] for one in record["measurements"].values()))
    assert found[1] == pytest.approx([7 / 3 * one for one in found[0]])
    document["latency"]["command"] = f"{sys.executable} -c 'raise SystemExit(3)' {{model}}"
    document["latency"]["retries"] = 0
    board.write_text(yaml.safe_dump(document))
    assert call(capsys, "profile", run.folder, "--device", board, "--samples", 5)[0] != DONE
