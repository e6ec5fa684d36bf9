"""The protocol is tested on scripted devices, the whole by small scripts that stand for devices."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from hardware_profiles import command_backend
from hardware_profiles.command import CommandFailed, CommandNotFound, CommandSettings, InvalidCommand
from hardware_profiles.command_backend import CommandBackend, MeasurementFailed, NoisyDevice, summarize
from hardware_profiles.host_cpu import anchor_model
from hardware_profiles.measurement import Measurement
from hardware_profiles.onnx_writer import random_ranges, random_weights, write_onnx
from search_spaces import MobileNet

BOARD = {"device": "board", "runtime": "a runtime 2.1", "hardware": "Example Board, 2 GHz"}


def _model(width: float = 0.5, precision: str = "fp32") -> bytes:
    space = MobileNet(resolutions=(8,), channels=1, width_multipliers=(width,), depths=(1,))
    network = space.lower(space.with_precision(space.smallest, precision))
    weights = random_weights(network, np.random.default_rng(0))
    return write_onnx(network, weights, random_ranges(network)).SerializeToString()


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    return {"small": _model(), "large": _model(2.0), "int8": _model(1.0, "int8")}


class _Device:
    """Stands for what a command reaches: names of the models visited, and how long each takes."""

    def __init__(self, latency_ms: Callable[[str], float | str]) -> None:
        self.latency_ms = latency_ms
        self.visits: list[str] = []

    def __call__(self, arguments: Sequence[str], timeout_s: float) -> str:
        name = arguments[-1]
        assert Path(arguments[1]).exists()
        self.visits.append(name)
        return f"{self.latency_ms(name)}\n"

    def times(self, name: str) -> int:
        return self.visits.count(name)


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Callable[[_Device], _Device]:
    def attach_device(device: _Device) -> _Device:
        monkeypatch.setattr(command_backend, "run_command", device)
        return device

    return attach_device


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Pauses are taken on a clock of their own, which the visits (0.1 s each) move too."""
    taken: list[float] = []
    now = [0.0]

    def sleep(seconds: float) -> None:
        taken.append(seconds)
        now[0] += seconds

    def monotonic() -> float:
        now[0] += 0.05
        return now[0]

    monkeypatch.setattr(command_backend.time, "sleep", sleep)
    monkeypatch.setattr(command_backend.time, "monotonic", monotonic)
    yield taken


def _backend(**settings: object) -> CommandBackend:
    return CommandBackend("fake {model} {name}", **{"pause_s": 0.0, **BOARD, **settings})  # type: ignore[arg-type]


# rounds -----------------------------------------------------------------------------------------------------


def test_networks_are_visited_in_rounds(models: Mapping[str, bytes], attach: Callable[[_Device], _Device]) -> None:
    device = attach(_Device(lambda name: {"small": 1.0, "large": 8.0, "int8": 3.0}[name]))
    seen: list[tuple[int, int]] = []
    measured = _backend(anchor=False, repeats=3).measure(models, lambda *counts: seen.append(counts))
    assert device.visits == ["small", "large", "int8"] * 3
    assert seen == [(done, 9) for done in range(1, 10)]
    assert list(measured) == list(models)
    assert measured["large"].latency_ms == measured["large"].p50_ms == measured["large"].p95_ms == 8.0
    assert (measured["large"].rounds, measured["large"].runs_per_round, measured["large"].spread) == (3, 1, 0.0)
    assert measured["large"].provenance.anchor_ms is None


def test_the_anchor_is_visited_before_and_after_every_few(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device]
) -> None:
    many = {f"n{i}": models["small"] for i in range(10)}
    device = attach(_Device(lambda name: 1.0))
    measured = _backend(repeats=2).measure(many)
    first, rest = [f"n{i}" for i in range(8)], ["n8", "n9"]
    assert device.visits == ["anchor", *first, "anchor", *rest, "anchor", *first, "anchor", *rest, "anchor"]
    assert all(each.provenance.anchor_ms == 1.0 for each in measured.values())


def test_provenance_is_what_the_user_says(models: Mapping[str, bytes], attach: Callable[[_Device], _Device]) -> None:
    attach(_Device(lambda name: 2.0))
    measured = _backend(threads=4).measure(models)
    for name, each in measured.items():
        provenance = each.provenance
        assert provenance.key == ("board", "a runtime 2.1", 4, 1, "Example Board, 2 GHz")
        assert provenance.precision == ("int8" if name == "int8" else "fp32")
        assert datetime.fromisoformat(provenance.date).utcoffset() is not None
        assert Measurement.from_json(json.loads(json.dumps(each.to_json()))) == each


def test_rounds_beside_a_slow_anchor_are_made_again(
    models: Mapping[str, bytes],
    attach: Callable[[_Device], _Device],
    pauses: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    anchors = iter([1.0, 1.05, 1.3, 1.2, 1.05, 1.0])  # round 1; round 2 is spoiled; still slow after a pause; round 3
    device = attach(_Device(lambda name: next(anchors) if name == "anchor" else (100.0 if spoiled() else 5.0)))

    def spoiled() -> bool:
        return device.times("small") == 2

    with caplog.at_level("INFO"):
        measured = _backend(repeats=2, pause_s=1.0).measure({"small": models["small"]})["small"]
    slow = [
        message for message in caplog.messages if "board is in a slow phase: its anchor network takes 1.3 ms" in message
    ]
    assert len(slow) == 1
    assert device.visits == ["anchor", "small", "anchor", "small", "anchor", "anchor", "anchor", "small", "anchor"]
    assert (measured.latency_ms, measured.p95_ms, measured.rounds, measured.outliers) == (5.0, 5.0, 2, 0)
    assert pauses == [1.0, pytest.approx(1.6)]
    assert measured.provenance.anchor_ms == 1.05


def test_a_new_best_anchor_disqualifies_what_was_measured_before(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device]
) -> None:
    anchors = iter([2.0, 2.0, 1.0, 1.0, 1.0])
    device = attach(_Device(lambda name: next(anchors) if name == "anchor" else 10.0 / device.times("small")))
    measured = _backend(repeats=2).measure({"small": models["small"]})["small"]
    assert device.times("small") == 4  # the first two were beside an anchor of 2 ms
    assert measured.p95_ms < 3.4


def test_patience_runs_out_and_keeps_what_was_measured(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device], pauses: list[float]
) -> None:
    device = attach(_Device(lambda name: (3.0 if device.times("anchor") > 3 else 1.0) if name == "anchor" else 4.0))
    with pytest.raises(
        NoisyDevice, match=r"^board: the device is too slow just now.*takes 3 ms, the best was 1 ms"
    ) as e:
        _backend(patience_s=60.0, pause_s=1.0).measure(models)
    assert e.value.model is None
    kept = {name: (each.latency_ms, each.rounds) for name, each in e.value.measured.items()}
    assert kept == dict.fromkeys(models, (4.0, 2))
    assert pauses == sorted(pauses) and 30.0 < sum(pauses) <= 75.0
    assert max(pauses) == command_backend.LONGEST_PAUSE_S


def test_a_wide_spread_is_kept_and_told(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device], caplog: pytest.LogCaptureFixture
) -> None:
    wide = iter([1.0, 2.0, 3.0, 4.0, 5.0])
    attach(_Device(lambda name: next(wide) if name == "small" else 1.0))
    measured = _backend(anchor=False).measure(models)
    assert measured["small"].spread == pytest.approx(1.4826 / 3)
    [record] = caplog.records
    assert record.getMessage() == "board, model 'small': its 5 rounds spread by 49 % (more than 5 %)"
    assert record.levelno == logging.WARNING


def test_nothing_to_measure_starts_nothing(attach: Callable[[_Device], _Device]) -> None:
    device = attach(_Device(lambda name: 1.0))
    assert _backend().measure({}) == {}
    assert device.visits == []


def test_a_name_that_cannot_stand_in_the_command_is_refused_before_anything_runs(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device]
) -> None:
    device = attach(_Device(lambda name: 1.0))
    with pytest.raises(InvalidCommand, match=r"'x; y' of a model cannot stand for \{name\}"):
        _backend().measure({"good": models["small"], "x; y": models["large"]})
    assert device.visits == []


def test_the_settings_of_a_device_file_are_taken_as_they_are() -> None:
    settings = CommandSettings("run {model}", 7.0, 1, 9, False)
    assert CommandBackend(**asdict(settings), **BOARD).settings == settings  # type: ignore[arg-type]


# failures ---------------------------------------------------------------------------------------------------


def test_a_failure_is_tried_again_and_told(
    models: Mapping[str, bytes],
    attach: Callable[[_Device], _Device],
    pauses: list[float],
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = attach(_Device(lambda name: "no" if device.times("small") in (1, 2) else 6.0))
    measured = _backend(anchor=False, repeats=1, retries=2, pause_s=2.5).measure({"small": models["small"]})
    assert measured["small"].latency_ms == 6.0
    assert pauses == [2.5, 2.5]
    told = [record.getMessage() for record in caplog.records]
    assert [text.split(":")[0] for text in told] == ["board, model 'small', try 1", "board, model 'small', try 2"]
    assert all(text.endswith("trying again") for text in told)


@pytest.mark.parametrize("anchor", [False, True])
def test_a_model_that_keeps_failing_is_named_and_the_rest_kept(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device], anchor: bool
) -> None:
    device = attach(_Device(lambda name: "Segmentation fault" if name == "large" and device.times(name) > 1 else 2.0))
    with pytest.raises(MeasurementFailed) as caught:
        _backend(anchor=anchor, retries=1).measure(models)
    error = caught.value
    assert str(error).startswith("board: model 'large', try 2: the command printed no latency (its last line: 'Segment")
    assert error.model == "large" and isinstance(error, RuntimeError) and not isinstance(error, NoisyDevice)
    assert {name: each.rounds for name, each in error.measured.items()} == {"small": 2, "large": 1, "int8": 1}
    assert error.measured["int8"].spread is None  # nobody knows the spread of one round


def test_a_failing_anchor_says_what_to_do(models: Mapping[str, bytes], attach: Callable[[_Device], _Device]) -> None:
    attach(_Device(lambda name: "unsupported type float" if name == "anchor" else 1.0))
    with pytest.raises(MeasurementFailed, match=r"board: the anchor network, try 3: .*\(anchor: false\)") as caught:
        _backend().measure(models)
    assert (caught.value.model, caught.value.measured) == (None, {})


def test_a_missing_program_is_not_tried_again(
    models: Mapping[str, bytes], monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    with pytest.raises(MeasurementFailed, match="model 'small', try 1: cannot start 'no-such-program': No such file"):
        CommandBackend("no-such-program {model}", anchor=False, **BOARD).measure(models)  # type: ignore[arg-type]
    with pytest.raises(MeasurementFailed, match=r"the anchor network, try 1: cannot start .* executable file$"):
        CommandBackend("no-such-program {model}", **BOARD).measure(models)  # type: ignore[arg-type]
    assert pauses == []
    assert issubclass(CommandNotFound, CommandFailed)


# going on ---------------------------------------------------------------------------------------------------


class _Unplugged(BaseException):
    """Ends everything at once, like a kill."""


def _unplug_after(visits: int) -> _Device:
    def latency_ms(name: str) -> float:
        if len(device.visits) > visits:
            raise _Unplugged
        return 3.0

    device = _Device(latency_ms)
    return device


@pytest.mark.parametrize("anchor", [False, True])
def test_a_killed_run_goes_on_where_it_was(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device], tmp_path: Path, anchor: bool
) -> None:
    record = tmp_path / "deep" / "board.json"
    first = attach(_unplug_after(7))
    with pytest.raises(_Unplugged):
        _backend(anchor=anchor).measure(models, record=record)
    done = sum(first.times(name) for name in models) - (first.visits[-1] in models)  # the last one was cut short
    second = attach(_Device(lambda name: 3.0))
    measured = _backend(anchor=anchor).measure(models, record=record)
    assert done + sum(second.times(name) for name in models) == 15
    assert all(each.rounds == 5 and each.latency_ms == 3.0 for each in measured.values())
    assert list(record.parent.iterdir()) == []  # a second measurement is a new one


def test_a_record_of_another_device_is_not_used(
    models: Mapping[str, bytes],
    attach: Callable[[_Device], _Device],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = tmp_path / "board.json"
    attach(_unplug_after(7))
    with pytest.raises(_Unplugged):
        _backend(anchor=False).measure(models, record=record)
    written = record.read_text()
    for changed in ({"runtime": "another"}, {"device": "x"}, {"hardware": "x"}, {"threads": 2}, {"anchor": True}):
        record.write_text(written)
        device = attach(_Device(lambda name: 3.0))
        _backend(**{"anchor": False, **changed}).measure(models, record=record)
        assert sum(device.times(name) for name in models) == 15
        assert "is of another device, command or runtime" in caplog.records[-1].getMessage()


def test_a_model_that_changed_is_measured_anew(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device], tmp_path: Path
) -> None:
    record = tmp_path / "board.json"
    attach(_unplug_after(6))
    with pytest.raises(_Unplugged):
        _backend(anchor=False).measure(models, record=record)
    device = attach(_Device(lambda name: 3.0))
    _backend(anchor=False).measure({**models, "small": models["large"], "new": models["small"]}, record=record)
    assert {name: device.times(name) for name in ("small", "large", "int8", "new")} == {
        **{"small": 5, "large": 3, "int8": 3, "new": 5}
    }


@pytest.mark.parametrize("text", ["nonsense", "[]", "{}", '{"schema": 9}', '{"schema": 1, "made_with": 3}'])
def test_a_file_that_is_no_record_is_refused(
    models: Mapping[str, bytes], attach: Callable[[_Device], _Device], tmp_path: Path, text: str
) -> None:
    attach(_Device(lambda name: 3.0))
    record = tmp_path / "board.json"
    record.write_text(text)
    if "made_with" in text:  # of another device
        assert len(_backend().measure(models, record=record)) == 3
    else:
        with pytest.raises(ValueError, match=r"board\.json.*delete it|expected a JSON object"):
            _backend().measure(models, record=record)
        assert record.read_text() == text


# figures ----------------------------------------------------------------------------------------------------


def test_figures_by_hand() -> None:
    figures = summarize([[1.0, 1.1, 1.2], [1.1, 1.2, 1.3], [1.2, 1.3, 1.4], [1.0, 9.0, 1.0], [9.0]])
    # all runs: median 1.2, deviations 0 0 0 .1 .1 .1 .1 .2 .2 .2 .2 7.8 7.8: their median 0.1, limit 1.7
    assert figures == {
        "latency_ms": pytest.approx(1.06),  # three fifths of the way from 1.0 to 1.1 among 1.0 1.1 1.2 1.3
        "p50_ms": pytest.approx(1.2),
        "p95_ms": pytest.approx(1.35),  # half way between the last two of eleven
        "spread": pytest.approx(1.4826 * 0.1 / 1.15),
        "rounds": 4,
        "runs_per_round": 3,
        "outliers": 2,
    }


def test_whole_milliseconds_are_no_outliers() -> None:
    assert summarize([[20.0]] * 4 + [[21.0]])["outliers"] == 0
    assert summarize([[20.0]] * 4 + [[23.0]])["outliers"] == 1


@pytest.mark.parametrize(("repeats", "runs"), [(5, 1), (5, 10), (10, 1)])
def test_estimates_hold_under_a_tenth_of_outliers(
    attach: Callable[[_Device], _Device], repeats: int, runs: int
) -> None:
    """True latencies from 0.5 to 50 ms, noise of 2 %, and 10 % of the runs five times as slow."""
    rng = np.random.default_rng(5)
    true_ms = {f"n{i}": float(np.exp(rng.uniform(np.log(0.5), np.log(50)))) for i in range(60)} | {"anchor": 1.0}

    def latency_ms(name: str) -> str:
        times = true_ms[name] * (1 + 0.02 * rng.standard_normal(runs))
        return "\n".join(map(str, times * np.where(rng.random(runs) < 0.1, 5.0, 1.0)))

    attach(_Device(latency_ms))
    content = _model()
    measured = _backend(anchor=False, repeats=repeats).measure({name: content for name in true_ms if name != "anchor"})
    errors = np.array([abs(each.latency_ms / true_ms[name] - 1) for name, each in measured.items()])
    assert errors.max() < 0.05
    assert np.median(errors) < 0.02
    outliers = sum(each.outliers for each in measured.values()) / (60 * repeats * runs)
    assert 0.05 < outliers < 0.15


# whole ------------------------------------------------------------------------------------------------------

LINEAR = """
import pathlib, sys
model = pathlib.Path(sys.argv[1])
with open(sys.argv[2], "a") as log:
    print(model, file=log)
print("loaded", model.name)
print(model.stat().st_size / 1000, "us")
"""


def _script(folder: Path, source: str) -> str:
    path = folder / "device.py"
    path.write_text(source)
    return f"'{sys.executable}' -S -E '{path}' {{model}} '{folder}/log'"


def test_a_device_whose_cost_is_linear_in_the_file(models: Mapping[str, bytes], tmp_path: Path) -> None:
    backend = CommandBackend(_script(tmp_path, LINEAR), repeats=2, **BOARD)  # type: ignore[arg-type]
    named = {"../small": models["small"], "large; rm": models["large"]}
    measured = backend.measure(named)
    for name, each in measured.items():
        assert each.latency_ms == pytest.approx(len(named[name]) / 1e6, rel=1e-9)
        assert each.provenance.anchor_ms == pytest.approx(len(anchor_model()) / 1e6, rel=1e-9)
    seen = [Path(line) for line in (tmp_path / "log").read_text().splitlines()]
    [folder] = {path.parent for path in seen}
    assert folder.parent == Path(tempfile.gettempdir()) and not folder.exists()
    names = [path.name for path in seen]
    assert names == ["anchor.onnx", *["00000.onnx", "00001.onnx", "anchor.onnx"] * 2]


CRASHES = """
import os, pathlib, sys
log = pathlib.Path(sys.argv[2])
calls = int(log.read_text() or 0) + 1 if log.exists() else 1
log.write_text(str(calls))
if calls == 3:
    sys.exit("error: device offline")
if calls == 4:
    os.kill(os.getpid(), 9)
print("latency_ms:", calls)
"""


def test_a_device_that_crashes_on_the_third_call(models: Mapping[str, bytes], tmp_path: Path) -> None:
    command = _script(tmp_path, CRASHES)
    two = {name: models[name] for name in ("small", "large")}
    with pytest.raises(MeasurementFailed) as caught:
        CommandBackend(command, anchor=False, retries=1, pause_s=0.0, **BOARD).measure(two)  # type: ignore[arg-type]
    assert str(caught.value) == ("board: model 'small', try 2: the command was killed by signal 9; it wrote nothing")
    assert {name: each.latency_ms for name, each in caught.value.measured.items()} == {"small": 1.0, "large": 2.0}
    (tmp_path / "log").unlink()
    measured = CommandBackend(command, anchor=False, retries=2, repeats=2, pause_s=0.0, **BOARD).measure(two)  # type: ignore[arg-type]
    assert {name: each.p50_ms for name, each in measured.items()} == {"small": (1 + 5) / 2, "large": (2 + 6) / 2}


def test_a_killed_process_leaves_a_record_to_go_on_from(models: Mapping[str, bytes], tmp_path: Path) -> None:
    """A real kill -9, between two visits, of the process that measures."""
    for name, content in models.items():
        (tmp_path / f"{name}.onnx").write_bytes(content)
    record = tmp_path / "record.json"
    script = f"""
import os, pathlib
from hardware_profiles.command_backend import CommandBackend
folder = pathlib.Path({str(tmp_path)!r})
backend = CommandBackend("sh -c 'echo 4.5' {{model}}", anchor=False, **{BOARD!r})
models = {{path.stem: path.read_bytes() for path in sorted(folder.glob("*.onnx"))}}
backend.measure(models, lambda done, total: done == 8 and os.kill(os.getpid(), 9), record=folder / "record.json")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(command_backend.__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    visits = json.loads(record.read_text())["visits"]
    assert sorted(len(each) for each in visits.values()) == [2, 3, 3]
    backend = CommandBackend("sh -c 'echo 4.5' {model}", anchor=False, **BOARD)  # type: ignore[arg-type]
    seen: list[int] = []
    ordered = {name: models[name] for name in sorted(models)}
    assert len(backend.measure(ordered, lambda done, total: seen.append(done), record=record)) == 3
    assert seen == [*range(9, 16)]
