"""The command: what it prints, its exit codes, and that nothing is written when it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from hardware_profiles.files import write_json
from nas.cli import BAD_INPUT, DONE, FAILED, INFEASIBLE, _names, main
from nas.costs import Figure, at_most, maximize, minimize
from nas.front import Evaluation, ParetoFront, to_dict
from tests.nas import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Relative paths end up in a folder of the test; the root logger is put back."""
    import logging

    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


def point(name: str, accuracy: float, latency_ms: float, sram_bytes: int) -> Evaluation:
    figures = {
        "accuracy": Figure.share(accuracy, 1000),
        "latency_ms@toy": Figure(latency_ms, None, None, "predicted"),
        "sram_bytes@toy": Figure.exact(sram_bytes),
    }
    return Evaluation(name, f"resolution={name}", figures, {"stem": "fp32"})


FRONT = ParetoFront.of(
    [
        point("aa1", 0.7, 1.0, 30_000),
        point("ab2", 0.8, 2.0, 20_000),
        point("cd3", 0.9, 4.0, 10_240),
        point("x", 0.5, 9.0, 1),
    ],
    [maximize("accuracy"), minimize("latency_ms", "toy")],
    space="a space",
    supernet_sha256="abc",
)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run that was searched; nothing in it was trained."""
    folder = tmp_path / "run"
    folder.mkdir()
    tiny.write_experiment(tmp_path).rename(folder / "experiment.yaml")
    FRONT.save(folder / "front.json")
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)"""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys: pytest.CaptureFixture[str], code: int, said: str, *arguments: object) -> None:
    got, out, err = call(capsys, *arguments)
    assert got == code and out == ""
    lines = {INFEASIBLE: (1, 2, 3)}.get(code, (1,))
    assert said in err and len(err.splitlines()) in lines and err.startswith("nas: "), err


def files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*")}


# queries -------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_a_point_and_says_where_numbers_come_from(
    run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "pareto", run_folder)
    lines = out.splitlines()
    assert code == DONE and len(lines) == 5
    assert lines[0].split("  ")[-1].strip() == "peak SRAM (KiB) toy"
    assert lines[3].split() == ["cd3", "90", "4", "10"]
    assert lines[4] == "3 non-dominated subnets; accuracy measured; latency_ms@toy predicted"


def test_json_is_the_documented_schema(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "pareto", run_folder, "--format", "json", "--limit", "latency_ms@toy<=3")
    content = json.loads(out)
    assert code == DONE and [p["id"] for p in content["points"]] == ["aa1", "ab2"]
    assert set(content) == set(to_dict(FRONT)) and content["limits"] == ["latency_ms@toy<=3"]
    assert content["points"][0]["values"]["latency_ms@toy"]["low"] is None


def test_csv_is_read_by_pandas(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "pareto", run_folder, "--format", "csv")
    frame = pd.read_csv(io.StringIO(out))
    assert code == DONE and list(frame["accuracy"]) == [0.7, 0.8, 0.9]
    assert list(frame["architecture"]) == ["resolution=aa1", "resolution=ab2", "resolution=cd3"]


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--best", "accuracy"], ["cd3"]),
        (["--best", "latency_ms@toy", "--limit", "accuracy>=75%"], ["ab2"]),
        (["--best", "accuracy", "--limit", "sram_bytes@toy >= 15KiB", "--limit", "latency_ms@toy<=1.5"], ["aa1"]),
        (["--knee"], ["ab2"]),
        (["--limit", "latency_ms@toy<=0.0021s"], ["aa1", "ab2"]),
    ],
)
def test_queries(arguments: list[str], ids: list[str], run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "pareto", run_folder, "--format", "json", *arguments)
    assert code == DONE and [p["id"] for p in json.loads(out)["points"]] == ids


def test_a_picture_is_written_where_it_is_asked_for(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "pareto", run_folder, "--plot", run_folder / "p.png", "--knee")
    assert code == DONE and (run_folder / "p.png").stat().st_size > 5000
    assert "p.png" in err and "p.png" not in out


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (BAD_INPUT, ["--limit", "latency_ms@toy<=5KiB"], "latency_ms is in ms, not 'KiB'"),
        (BAD_INPUT, ["--limit", "latency_ms<=5"], "write latency_ms@DEVICE"),
        (BAD_INPUT, ["--limit", "latency_ms@host-cpu<=5"], "the front has no latency_ms@host-cpu; it has accuracy"),
        (BAD_INPUT, ["--limit", "flash_bytes@toy<=5"], "the front has no flash_bytes@toy"),
        (BAD_INPUT, ["--limit", "quick"], "write NAME[@DEVICE]<=NUMBER[unit]"),
        (BAD_INPUT, ["--best", "speed"], "unknown figure 'speed'"),
        (BAD_INPUT, ["--best", "macs"], "the front has no macs"),
        (INFEASIBLE, ["--limit", "latency_ms@toy<=0.1"], "what binds is latency_ms@toy<=0.1.\nThe nearest reachable"),
        (INFEASIBLE, ["--limit", "accuracy>=0.85", "--limit", "latency_ms@toy<=1.5"], "The nearest reachable point is"),
    ],
)
def test_a_query_that_has_no_answer_is_refused_and_draws_nothing(
    code: int, arguments: list[str], said: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run_folder)
    refused(capsys, code, said, "pareto", run_folder, "--plot", run_folder / "p.png", *arguments)
    assert files(run_folder) == before


def test_an_empty_or_broken_front_is_told(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ParetoFront(FRONT.objectives, ()).save(run_folder / "front.json")
    refused(capsys, INFEASIBLE, "the front has no point", "pareto", run_folder)
    (run_folder / "front.json").write_text("{")
    refused(capsys, BAD_INPUT, "front.json is not readable as JSON", "pareto", run_folder)
    write_json(run_folder / "front.json", {"schema": 1})
    refused(capsys, BAD_INPUT, "is not a complete front", "pareto", run_folder)


# tables, front files, two fronts --------------------------------------------------------------------------

TABLE = "id,op_0,acc,ms\na,1,90,5\nb,2,80,2\nc,3,70,4\n"
ASKED = ("--objective", "acc:max", "--objective", "ms:min")


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


def test_a_table_is_queried_like_a_run(table_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "pareto", table_file, *ASKED, "--limit", "ms<=4", "--architecture-columns", "op_*")
    assert code == DONE and out.splitlines()[1].split() == ["b", "80", "2"] and len(out.splitlines()) == 3
    code, out, _ = call(capsys, "pareto", table_file, *ASKED, "--format", "json", "--best", "acc")
    content = json.loads(out)
    assert [p["id"] for p in content["points"]] == ["a"] and content["objectives"][0]["unit"] is None


def test_two_fronts_are_compared(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.csv"
    other.write_text("accuracy,latency_ms@toy\n0.6,1\n0.9,3\n")
    arguments = ("pareto", run_folder, "--against", other, "--reference", "latency_ms@toy=5")
    code, out, err = call(capsys, *arguments, "--format", "json", "--plot", tmp_path / "p.png")
    content = json.loads(out)
    assert code == DONE and "p.png" in err and (tmp_path / "p.png").stat().st_size > 5000
    assert set(content) == {
        "objectives", "noise", "reference", "points", "hypervolume", "adds", "beaten", "epsilon", "budgets"
    }  # fmt: skip
    assert content["points"] == {"a": 3, "b": 2} and content["beaten"] == {"a": 1, "b": 1}
    assert content["reference"]["latency_ms@toy"] == 5
    assert [b["ahead"] for b in content["budgets"]] == ["a", "b", None]
    code, out, _ = call(capsys, *arguments)
    assert code == DONE and "1 of 3" in out and "Best accuracy (%) within a budget of latency (ms) on toy" in out
    code, out, _ = call(capsys, "pareto", run_folder, "--against", run_folder / "front.json")
    assert code == DONE and "0 of 3" in out


@pytest.mark.parametrize(
    ("code", "arguments", "said"),
    [
        (BAD_INPUT, ["{table}"], "say what is searched for"),
        (BAD_INPUT, ["{table}", "--objective", "speed:max"], "has no column 'speed'"),
        (BAD_INPUT, ["{table}", "--objective", "acc"], "acc:max or :min"),
        (BAD_INPUT, ["{table}", *ASKED, "--kind", "3d", "--plot", "p.png"], "needs three objectives"),
        (BAD_INPUT, ["{table}", *ASKED, "--plot", "p.nosuch"], "nosuch"),
        (BAD_INPUT, ["nowhere.csv", *ASKED], "nowhere.csv: there is no such file"),
        (BAD_INPUT, ["nowhere"], "is no run directory"),
        (BAD_INPUT, ["{run}", "--against", "nowhere.json"], "nowhere.json: there is no such file"),
        (BAD_INPUT, ["{run}", "--against", "{table}"], "has no column 'accuracy'"),
        (BAD_INPUT, ["{run}", "--against", "{table}", *ASKED], "different objectives cannot be compared"),
        (BAD_INPUT, ["{run}", "--against", "{run}", "--knee"], "--knee is about one front"),
        (BAD_INPUT, ["{run}", "--against", "{run}", "--reference", "accuracy"], "expected FIGURE=NUMBER"),
        (BAD_INPUT, ["{run}", "--reference", "accuracy=0"], "belongs to --against"),
        (BAD_INPUT, ["{table}", *ASKED, "--limit", "weight<=3"], "weight"),
        (INFEASIBLE, ["{table}", *ASKED, "--limit", "ms<=1"], "what binds is ms<=1"),
    ],
)
def test_what_cannot_be_compared_or_read_is_told_in_a_line(
    code: int, arguments: list[str], said: str, run_folder: Path, table_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filled = [text.format(run=run_folder, table=table_file) for text in arguments]
    refused(capsys, code, said, "pareto", *filled)


# bad input -----------------------------------------------------------------------------------------------

BAD_EXPERIMENTS: list[tuple[dict[str, Any], str]] = [
    ({"devices": [{"name": "stm32f764"}]}, "did you mean 'stm32f746'?"),
    ({"devices": [{"name": "nowhere.yaml"}]}, "nowhere.yaml"),
    ({"space": {"family": "mobilnet"}}, "did you mean 'mobilenet'?"),
    ({"space": tiny.SPACE | {"family": "mobilenet", "width": [8]}}, "unknown setting 'width'; did you mean 'widths'"),
    ({"space": tiny.SPACE | {"family": "mobilenet", "resolutions": [4]}}, "resolutions"),
    ({"space": tiny.SPACE | {"family": "mobilenet", "resolutions": 8}}, "resolutions"),
    ({"space": tiny.SPACE | {"family": "mobilenet", "classes": 9}}, "the space has 9 classes"),
    ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
    ({"data": {"path": "nowhere.npz"}}, "nowhere.npz': expected 'digits', an .npz file or a folder"),
    ({"data": {"path": "text.npz"}}, ".npz file"),
    ({"data": {"path": "mismatch.npz"}}, "30 images but 29 labels"),
    ({"data": {"path": "one.npz"}}, "the same class"),
    ({"search": {"limits": ["latency_ms@toy<=5KiB"]}}, "latency_ms is in ms, not 'KiB'"),
    ({"search": {"limits": ["latency_ms@toi<=5"]}}, "did you mean 'toy'?"),
    (
        {"search": {"objectives": ["accuracy", "sram_bytes@host-cpu"]}, "devices": [{"name": "host-cpu"}]},
        "no memory planner",
    ),
    (
        {"export": {"best": "latency_ms@toy"}, "search": {"objectives": ["accuracy"]}},
        "the front will have no latency_ms@toy",
    ),
    (
        {
            "devices": [{"name": "stm32f746"}],
            "search": {"limits": ["latency_ms@stm32f746<=5"], "confidence": 0.95},
        },
        "error of the latencies of stm32f746 is not known",
    ),
    ({"search": {"confidence": 0.9}}, "only 0.95 can be asked for"),
    ({"name": "../outside"}, "name: expected letters"),
]


@pytest.mark.parametrize(("change", "said"), BAD_EXPERIMENTS, ids=[said[:32] for _, said in BAD_EXPERIMENTS])
def test_bad_input_is_one_line_and_writes_nothing(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 255, (30, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "mismatch.npz", x_train=images, y_train=np.arange(29) % 3)
    np.savez(tmp_path / "one.npz", x_train=images, y_train=np.zeros(30, np.int64))
    (tmp_path / "text.npz").write_text("no arrays")
    path = tiny.write_experiment(tmp_path, **change)
    before = files(tmp_path)
    for verb in ("run", "train"):
        refused(capsys, BAD_INPUT, said, verb, path)
        refused(capsys, BAD_INPUT, said, verb, path, "--out", tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"limits": ["latency_ms@toy<=1us"]}, "what binds is latency_ms@toy<=0.001 (latency_ms@toy is reachable"),
        ({"limits": ["macs<=1k", "model_bytes<=100"]}, "what binds is macs<=1000, model_bytes<=100"),
        ({"objectives": ["accuracy", "latency_ms@adreno540", "latency_ms@stm32f746"]}, "no architecture is legal on"),
    ],
)
def test_limits_out_of_reach_are_told_before_training(
    change: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tiny.experiment(tmp_path)
    devices = [*plan["devices"], {"name": "adreno540"}, {"name": "stm32f746"}]
    path = tiny.write_experiment(tmp_path, search=plan["search"] | change, devices=devices)
    before = files(tmp_path)
    refused(capsys, INFEASIBLE, said, "run", path)
    assert files(tmp_path) == before


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_experiment(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    refused(capsys, BAD_INPUT, "is not empty and holds no experiment.yaml", "run", path, "--out", other)
    held = tmp_path / "held"
    held.mkdir()
    (held / "experiment.yaml").write_text(yaml.safe_dump(tiny.experiment(tmp_path) | {"seed": 3}))
    before = (held / "experiment.yaml").read_bytes()
    refused(capsys, BAD_INPUT, "holds another experiment: seed differ", "run", path, "--out", held)
    assert (held / "experiment.yaml").read_bytes() == before and len(files(held)) == 1


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        (["search"], "has no trained supernet yet; run 'nas train"),
        (["trust"], "has no trained supernet yet; run 'nas train"),
        (["export", "--id", "aa1"], "has no trained supernet yet"),
        (["export", "--id", "zz"], "evaluated anything called 'zz': its front has no such id; 'nas pareto"),
        (["export", "--id", "a"], "2 points of the front have an id that starts with 'a'"),
        (["export", "--best", "macs"], "the front has no macs"),
        (["export", "--architecture", "depth=7"], "has no choice 'depth'"),
        (["profile", "--device", "host-cpu", "--samples", "3"], "samples = 3; expected 4 or more"),
        (["profile", "--device", "hostcpu"], "did you mean 'host-cpu'"),
        (["search", "--confidence", "0.9"], "only 0.95 can be asked for"),
        (["search", "--limit", "latency_ms@toy<=5KiB"], "not 'KiB'"),
        (["search", "--limit", "latency_ms@host-cpu<=5"], "'host-cpu' is not profiled; profiled here: toy"),
    ],
)
def test_verbs_that_need_more_of_a_run_say_what(
    verb: list[str], said: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(run_folder)
    refused(capsys, BAD_INPUT, said, verb[0], run_folder, *verb[1:])
    assert files(run_folder) == before


@pytest.mark.parametrize("option", [("--set", "train.epochs=1"), ("--out", "elsewhere")])
def test_training_a_run_takes_no_other_settings(
    option: tuple[str, str], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    refused(
        capsys,
        BAD_INPUT,
        f"is a run, which keeps its experiment and its place: {option[0]} cannot change them",
        "train",
        run_folder,
        *option,
    )
    assert files(tmp_path) == before


@pytest.mark.parametrize("verb", ["pareto", "search"])
def test_a_folder_without_a_run_is_told(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, BAD_INPUT, "is no run directory: it has no experiment.yaml", verb, tmp_path)


def test_a_run_that_was_not_searched_has_no_front(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "front.json").unlink()
    refused(capsys, BAD_INPUT, "has no front yet; run 'nas search", "pareto", run_folder)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["pareto"],
        ["search", "x", "--trials", "0"],
        ["trust", "x", "--networks", "0"],
        ["export", "x"],
        ["train", "x", "--resume"],
    ],
)
def test_bad_usage_exits_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, *arguments)
    assert code == BAD_INPUT and out == "" and "usage: nas" in err


def test_a_bug_keeps_its_traceback_and_a_failure_does_not(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: BaseException) -> Any:
        def raising(*_: object) -> None:
            raise error

        return raising

    monkeypatch.setattr(ParetoFront, "load", fail(ZeroDivisionError("oops")))
    with pytest.raises(ZeroDivisionError):
        main(["pareto", str(run_folder)])
    monkeypatch.setattr(ParetoFront, "load", fail(OSError(28, "No space left on device")))
    refused(capsys, FAILED, "No space left", "pareto", run_folder)
    with pytest.raises(OSError, match="No space left"):
        main(["--debug", "pareto", str(run_folder)])
    monkeypatch.setattr(ParetoFront, "load", fail(KeyboardInterrupt()))
    assert call(capsys, "pareto", run_folder)[0] == FAILED


# lists ---------------------------------------------------------------------------------------------------


def test_spaces_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "spaces")
    assert code == DONE and [line.split(":")[0] for line in out.splitlines()] == ["mobilenet", "compact_transformer"]
    code, out, _ = call(capsys, "spaces", "mobilenet")
    assert code == DONE and "resolution:" in out
    refused(capsys, BAD_INPUT, "did you mean 'mobilenet'", "spaces", "mobilnet")


def test_devices_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hardware_profiles import device_names

    code, out, _ = call(capsys, "devices")
    titles, *lines = out.splitlines()
    assert code == DONE and tuple(line.split()[0] for line in lines) == device_names()
    assert titles.split()[:6] == ["name", "kind", "runtime", "SRAM", "flash", "precisions"]
    row = {line.split()[0]: line for line in lines}
    for name, said in {
        "stm32f746": r"mcu .*TinyEngine +320 KiB +1024 KiB +int8 +derived +not known$",
        "stm32l4r5-xcubeai": r"mcu .*X-CUBE-AI 7.3 +640 KiB .*fitted +6\.1%, \+-19% +31\.2% +5\.3%, \+-17%$",
        "host-cpu": r"cpu .*onnxruntime +fp32/int8 +measured +by 'nas profile'$",
        "ethos-u55-128": r"npu .*Vela 5 +int8 +simulated +not known$",
    }.items():
        assert re.search(said, row[name]), row[name]
    code, out, _ = call(capsys, "devices", "stm32h743")
    assert code == DONE and "limits.sram_bytes: MCUNet" in out and "memory.sram_overhead: mean over" in out
    assert "held-out error 1.4% on average (MACs only: 8.8%), 90 % interval +-4%" in out
    code, out, _ = call(capsys, "devices", "stm32u575-xcubeai")
    assert code == DONE and re.search(r"^energy: energy over latency of 4 networks", out, re.MULTILINE)
    code, out, _ = call(capsys, "devices", tiny.write_device(tmp_path))
    assert code == DONE and "latency fitted; 90 % interval +-10%\n" in out
    refused(capsys, BAD_INPUT, "did you mean 'stm32h743'", "devices", "stm32h473")


def test_devices_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    from hardware_profiles import device_names

    code, out, _ = call(capsys, "devices", "--format", "json")
    found = {device["name"]: device for device in json.loads(out)}
    assert code == DONE and tuple(found) == device_names()
    assert all(device["sources"]["latency"] for device in found.values())
    mcu = found["stm32l4r5-cmsisnn"]
    assert (mcu["kind"], mcu["sram_limit_bytes"], mcu["precisions"]["conv2d"]) == ("mcu", 640 * 1024, ["int8"])
    assert mcu["latency"]["held_out"]["networks"] == 4 and 0 < mcu["latency"]["relative_error_90"] < 0.3
    assert mcu["energy"]["power_mw"] == pytest.approx(52, abs=1)
    assert found["stm32f746"]["latency"]["relative_error_90"] is found["stm32f746"]["energy"] is None


def space_of(text: str) -> Any:
    """The space that the end of the output states for an experiment."""
    from search_spaces import build_space

    content = yaml.safe_load(text[text.index("space:\n") :])
    assert list(content) == ["space"]
    return build_space(content["space"].pop("family"), content["space"])


FIT = ("spaces", "mobilenet", "--fit", "stm32f746", "--resolutions", 48, 96, "--widths", 0.5, 1, "--samples", 20)


def test_spaces_are_ranked_for_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hardware_profiles import load_device
    from nas.costs import ProfiledDevice
    from nas.scaling import fit_device

    picture = tmp_path / "cdf.png"
    code, out, err = call(capsys, *FIT, "--set", "depths=[1, 2]", "--classes", 4, "--plot", picture)
    assert code == DONE and f"picture: {picture}" in err and picture.read_bytes().startswith(b"\x89PNG")
    settings = {"depths": [1, 2], "classes": 4}
    device = ProfiledDevice(load_device("stm32f746"))
    expected = fit_device("mobilenet", settings, device, resolutions=(48, 96), widths=(0.5, 1.0), samples=20)
    lines = out.splitlines()
    assert lines[0].split() == ["resolution", "width", "fit", "mean", "MMACs", "p10", "p50", "p90"] and lines[5] == ""
    assert [(int(line.split()[0]), float(line.split()[1])) for line in lines[1:5]] == [
        (candidate.resolution, candidate.width) for candidate in expected
    ]
    assert lines[1].split()[2:4] == [f"{expected[0].share:.1%}", f"{expected[0].mean_macs / 1e6:.4g}"]
    best = space_of(out)
    assert best.settings["classes"] == 4 and best.settings["precisions"] == ["int8"]
    assert best.choice("resolution").options == (expected[0].resolution,)
    assert best.choice("stage1.depth").options == (1, 2)
    _, out, _ = call(capsys, *FIT, "--set", "depths=[1, 2]", "--classes", 4, "--format", "json", "--seed", 0)
    assert json.loads(out) == [candidate.to_dict() for candidate in expected]
    assert "classes" not in call(capsys, *FIT)[1]  # an experiment takes them from its data


def test_a_long_ranking_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "spaces", "mobilenet", "--fit", "stm32h743", "--samples", 1, "--seed", 1)
    assert code == DONE and "\nand 88 more spaces, which --format json lists\n" in out


def test_a_space_is_scaled_to_macs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "spaces", "mobilenet", "--macs", "5M", "--set", "widths=[24, 48, 96]")
    assert code == DONE and err == ""
    space = space_of(out)
    macs = space.lower(space.largest).macs
    assert out.startswith(f"largest network: {macs / 1e6:.4g} MMACs for 5 asked, ") and abs(macs / 5e6 - 1) < 0.15
    _, out, _ = call(capsys, "spaces", "mobilenet", "--macs", "5000k", "--set", "widths=[24,48,96]", "--format", "json")
    content = json.loads(out)
    assert content["macs"] == macs and content["space"].pop("family") == "mobilenet"
    assert content["space"] == space.settings
    _, out, _ = call(capsys, "spaces", "mobilenet", "--macs", "22M")
    assert "outside the ratios of the TinyNets" in out


def test_spaces_that_cannot_be_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    mobilenet = ("spaces", "mobilenet")
    for code, said, arguments in (
        (BAD_INPUT, "name a family", ("spaces", "--fit", "stm32f746")),
        (BAD_INPUT, "name a family", ("spaces", "--macs", "5M")),
        (BAD_INPUT, "did you mean 'stm32f746'", (*mobilenet, "--fit", "stm32f764")),
        (BAD_INPUT, "did you mean 'mobilenet'", ("spaces", "mobilnet", "--macs", "5M")),
        (BAD_INPUT, "--samples belongs to --fit", (*mobilenet, "--macs", "5M", "--samples", 3)),
        (BAD_INPUT, "--seed belongs to --fit", (*mobilenet, "--seed", 0)),
        (BAD_INPUT, "--format json belongs to --fit and --macs", (*mobilenet, "--format", "json")),
        (BAD_INPUT, "unknown setting 'depth'; did you mean 'depths'", (*mobilenet, "--set", "depth=[1]")),
        (BAD_INPUT, "expected KEY=VALUE, such as 'depths=[1, 2]'", (*mobilenet, "--set", "depths")),
        (BAD_INPUT, "expected KEY=VALUE", (*mobilenet, "--set", "depths=[1")),
        (BAD_INPUT, "take a larger base", (*mobilenet, "--macs", "5G")),
        (BAD_INPUT, "does not say how to scale", ("spaces", "compact_transformer", "--macs", "1M")),
        (BAD_INPUT, "cannot draw x.zip", (*FIT, "--plot", "x.zip")),
        (BAD_INPUT, "seed = -1; expected 0 or more", (*FIT, "--seed", -1)),
        (BAD_INPUT, "restrict = {'stage1.depth': [2]}: expected none", (*FIT, "--set", "restrict={stage1.depth: [2]}")),
        (BAD_INPUT, "resolutions = [64]: expected none", (*FIT, "--set", "resolutions=[64]")),
        (BAD_INPUT, "has no limit on SRAM or flash", (*mobilenet, "--fit", "host-cpu")),
        (INFEASIBLE, "the narrowest blocks", (*mobilenet, "--macs", 1000)),
    ):
        refused(capsys, code, said, *arguments)
    code, out, err = call(capsys, *mobilenet, "--fit", "stm32f746", "--resolutions", 224, "--widths", 9, "--samples", 1)
    assert code == INFEASIBLE and out == ""
    assert "no network fits stm32f746; the nearest, at resolution 224 and width 9, needs" in err.splitlines()[-1]
    for wrong in ("5Mk", "-5M", "0", "five", "5ms"):
        code, out, err = call(capsys, *mobilenet, f"--macs={wrong}")
        assert code == BAD_INPUT and "expected a number of MACs such as 5M or 300k" in err and out == ""
    for option, wrong in (("--widths", "0"), ("--widths", "nan"), ("--resolutions", "0"), ("--samples", "0")):
        assert call(capsys, *mobilenet, "--fit", "stm32f746", f"{option}={wrong}")[0] == BAD_INPUT


def test_a_family_is_described_with_settings(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "spaces", "mobilenet", "--set", "restrict={stage1.depth: [2]}", "--channels", 1)
    assert code == DONE and "stage1.depth: 2\n" in out and "by default" not in out.splitlines()[0]
    code, out, _ = call(capsys, "spaces", "mobilenet", "--set", "depths=[60]")
    assert code == DONE and re.search(r" choices, [1-9]\.\d\de\+\d+ architectures, ", out.splitlines()[0])


def test_a_check_tells_the_rank_correlation_or_that_there_is_none() -> None:
    from nas.cli import _summary_of_check

    shares = dict.fromkeys(("median_error", "within_10_percent", "macs_only_median_error", "repeat_noise"), 0.1)
    said = {rho: _summary_of_check("board", {"networks": 3, "spearman": rho, **shares}) for rho in (0.5, None)}
    assert "Spearman 0.500;" in said[0.5] and "rank correlation not defined" in said[None]


def test_a_limit_beyond_memory_is_shown_in_the_table() -> None:
    from nas.cli import table

    noisy = ParetoFront.of(
        FRONT.points, FRONT.objectives, limits=[at_most("sram_bytes", 25_000, "toy")], noise={"accuracy": 0.01}
    )
    assert table(noisy).endswith(
        "2 non-dominated subnets; accuracy measured; latency_ms@toy predicted; noise of accuracy 1.0%"
    )


def test_what_left_the_front_once_measured_is_marked_below_it_with_what_was_believed() -> None:
    from nas.cli import table

    measured = [
        replace(
            point,
            figures=point.figures | {"latency_ms@toy": Figure(latency_ms, None, None, "measured")},
            predicted={"latency_ms@toy": point.figures["latency_ms@toy"], "accuracy": Figure.share(0.65, 100)},
        )
        for point, latency_ms in zip(FRONT.points, (1.5, 5.0, 4.5), strict=True)
    ]
    front = replace(ParetoFront.of(measured, FRONT.objectives), left=("ab2",))
    lines = table(front).splitlines()
    titles = re.split(r"  +", lines[0].strip())
    assert titles[1:5] == ["accuracy (%)", "in the search", "latency (ms) toy", "predicted toy"]
    assert [line.split()[:-1] for line in lines[1:4]] == [
        ["aa1", "70", "65", "1.5", "1"],
        ["cd3", "90", "65", "4.5", "4"],
        ["*", "ab2", "80", "65", "5", "2"],
    ]
    assert lines[4].startswith("2 non-dominated subnets; ")
    assert lines[5] == "* 1 that the search had on its front and that left it once measured anew"
    assert "*" not in table(replace(front, left=()))


def test_a_single_point_comes_without_what_left_the_front(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    replace(FRONT, left=("x",)).save(run_folder / "front.json")
    assert "* x" in call(capsys, "pareto", run_folder)[1]
    for query in (["--best", "accuracy"], ["--knee"]):
        code, out, _ = call(capsys, "pareto", run_folder, *query)
        assert code == DONE and len(out.splitlines()) == 3 and "*" not in out


def test_whoever_has_seen_enough_may_stop_reading(run_folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does once it has its lines
    command = [sys.executable, "-m", "nas", "pareto", str(run_folder), "--format", "json"]
    with os.fdopen(writing, "w") as closed:
        ended = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert ended.returncode == DONE and ended.stderr == ""


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("runs/a", "runs/b", ("A (a)", "B (b)")),
        ("runs/a", "/old/a", ("A (runs/a)", "B (old/a)")),
        ("runs/a", "runs/a/fronts/1.json", ("A (a)", "B (1.json)")),
        ("runs/a", "runs/a", ("A (runs/a)", "B (runs/a)")),
    ],
)
def test_fronts_in_a_picture_are_called_by_what_differs(first: str, second: str, names: tuple[str, str]) -> None:
    assert _names(Path(first), Path(second)) == names


@pytest.mark.parametrize("arguments", [["--help"], ["devices"], ["spaces"]])
def test_help_and_lists_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from nas.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "print(*{'torch', 'optuna', 'pandas'} & set(sys.modules), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.strip() == "" and done.stdout
    assert time.monotonic() - started < 20
