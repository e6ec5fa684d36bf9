"""Runs: every stage once, again only when what it depends on changed, and after any death."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from sklearn import datasets

import nas
from hardware_profiles import load_device
from hardware_profiles.host_cpu import NoisyMachine
from hardware_profiles.measurement import Measurement
from nas.checkpoints import load_checkpoint
from nas.cli import main
from nas.config import BadExperiment, DeviceSettings, read_experiment
from nas.front import ParetoFront
from nas.pipeline import Run, with_search
from search_spaces import Architecture, MobileNet, SearchSpace
from tests.nas import tiny
from tests.nas.training import metrics

ROOT = Path(__file__).parents[2]


def plan(folder: Path, **changed: Any) -> nas.Experiment:
    return read_experiment(tiny.write_experiment(folder, **changed))


def everything(run: Run) -> tuple[ParetoFront, dict[str, Any]]:
    """All stages, as `nas run` does them."""
    run.train()
    front = run.search()
    return front, run.export(run.chosen(front))[1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run`; its tests work on copies."""
    folder = tmp_path_factory.mktemp("finished")
    everything(Run.create(folder / "run", plan(folder)))
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Run:
    shutil.copytree(finished / "run", tmp_path / "run")
    return Run.open(tmp_path / "run")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which stages really did something."""
    made: list[str] = []
    pipeline = importlib.import_module("nas.pipeline")
    trainer = importlib.import_module("nas.train")

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            made.append(name)
            return function(*arguments, **options)

        return call

    for name in ("search", "remeasure", "export", "profile"):
        monkeypatch.setattr(pipeline, name, counted(name, getattr(pipeline, name)))
    monkeypatch.setattr(trainer._Trainer, "_train_step", counted("step", trainer._Trainer._train_step))
    return made


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This machine, measured by formulas: nothing depends on how busy it is."""

    def untrained(
        space: SearchSpace, architectures: Sequence[Architecture], *_: Any, **__: Any
    ) -> dict[str, Measurement]:
        return {a.id: tiny.measurement(space.lower(a).macs * 1e-6 + 0.01) for a in architectures}

    def deployed(models: Mapping[str, bytes], *_: Any, **__: Any) -> dict[str, Measurement]:
        return {name: tiny.measurement(len(model) * 1e-5) for name, model in models.items()}

    monkeypatch.setattr(importlib.import_module("nas.profile"), "measure_untrained", untrained)
    for name in ("nas.remeasure", "nas.export"):
        monkeypatch.setattr(importlib.import_module(name), "measure", deployed)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# stages --------------------------------------------------------------------------------------------------


def test_a_run_has_its_documented_files_and_a_second_does_nothing(tmp_path: Path, calls: list[str]) -> None:
    folder = tmp_path / "run"
    run = Run.create(folder, plan(tmp_path))
    front, manifest = everything(run)
    assert {"search", "remeasure", "export"} <= set(calls) and "profile" not in calls
    assert {p.name for p in folder.iterdir()} >= {
        "experiment.yaml",
        "supernet",
        "metrics.jsonl",
        "study.db",
        "front.json",
        "exports",
    }
    assert ParetoFront.load(folder / "front.json") == front and len(front) >= 2
    assert all(point.figures["accuracy"].origin == "measured" for point in front.points)
    assert manifest["int8_macs_share"] >= 0.5
    assert (folder / "exports" / manifest["id"] / "model.onnx").is_file()
    held = yaml.safe_load((folder / "experiment.yaml").read_text())
    assert held["versions"]["torch"] and held["search"]["trials"] == 24
    stages = json.loads((folder / "stages.json").read_text())
    assert {"train", "search", "measure", "export"} <= set(stages)
    calls.clear()
    assert everything(Run.create(folder, plan(tmp_path))) == (front, manifest)
    assert everything(Run.open(folder)) == (front, manifest)
    assert calls == []


def test_accuracies_of_a_front_are_not_those_the_search_saw(run: Run) -> None:
    for point in run.front.points:
        architecture = run.space.parse(point.architecture)
        assert point["accuracy"] == run.evaluator.accuracy(architecture, "val_front")
        assert point.predicted["accuracy"].value == run.evaluator.accuracy(architecture, "val_search")


def test_what_changed_is_done_again_and_nothing_else(run: Run, tmp_path: Path, calls: list[str]) -> None:
    folder = tmp_path / "run"
    base = tiny.experiment(tmp_path)
    first, manifest = everything(run)
    assert calls == []

    smaller = plan(tmp_path, export={"best": "latency_ms@toy", "limits": []})
    front, other = everything(Run.create(folder, smaller))
    assert calls == ["export"] and front == first and other["id"] != manifest["id"]

    calls.clear()
    longer = plan(tmp_path, search=base["search"] | {"trials": 30})
    front, _ = everything(Run.create(folder, longer))
    assert calls[:2] == ["search", "remeasure"] and "step" not in calls
    assert len(front.points) + len(front.others) == 30

    calls.clear()
    everything(Run.create(folder, longer))
    assert calls == []

    (tmp_path / "other").mkdir()
    other_device = plan(
        tmp_path,
        devices=[{"name": str(tiny.write_device(tmp_path / "other", threads=2))}],
        search=base["search"] | {"trials": 30},
    )
    everything(Run.create(folder, other_device))
    assert calls == ["search", "remeasure", "export"]

    (folder / "front.json").write_text((folder / "front.json").read_text().replace("accuracy", "acuracy"))
    calls.clear()
    Run.create(folder, other_device).search()
    assert calls == ["search", "remeasure"]  # what somebody else wrote is not taken for ours

    for change in (
        {"seed": 1},
        {"train": base["train"] | {"epochs": 3}},
        {"space": base["space"] | {"head_width": 24}},
    ):
        with pytest.raises(BadExperiment, match=f"holds another experiment: {next(iter(change))} differ"):
            Run.create(folder, plan(tmp_path, **change))


def test_a_search_with_other_limits_keeps_the_recipe(run: Run) -> None:
    macs = run.front.points[-1]["macs"]
    limited = with_search(run, [f"macs<={macs - 1}", "latency_ms@toy<=5"], confidence=0.95, trials=12)
    front = limited.search()
    assert all(point["macs"] < macs for point in front.points)
    assert [limit.confidence for limit in front.limits][:2] == [None, 0.95]
    assert Run.open(run.folder).experiment == run.experiment


def test_the_front_of_an_earlier_search_is_kept_and_its_points_can_be_exported(
    run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = run.front
    slowest = first.points[-1]
    limit = f"{first.objectives[1].key}<={first.points[0][first.objectives[1].key]}"
    with caplog.at_level("INFO"):
        second = with_search(run, [limit]).search()
    assert slowest.id not in {each.id for each in second.points}
    assert ParetoFront.load(run.folder / "fronts" / "1.json") == first
    assert "the front before this one is kept" in caplog.text and "fronts/1.json" in caplog.text
    run.search()  # the recipe's own again
    assert ParetoFront.load(run.folder / "fronts" / "2.json") == second
    ParetoFront(first.objectives, (replace(slowest, id="only-there"),)).save(run.folder / "fronts" / "1.json")
    assert run.find("only").architecture == slowest.architecture
    beside = next(each for each in first.others if each.id not in {point.id for point in first.points})
    assert run.find(beside.id).id == beside.id
    assert main(["export", str(run.folder), "--id", "no such"]) == 2
    assert "evaluated anything called 'no such': its front has no such id, nor any of the 2" in capsys.readouterr().err


def test_a_live_device_is_profiled_once_and_its_front_is_measured(
    tmp_path: Path, calls: list[str], machine: None
) -> None:
    host = {
        "devices": [{"name": "host-cpu", "samples": 60}],
        "search": {"objectives": ["accuracy", "latency_ms@host-cpu"], "trials": 12, "population": 4},
        "export": {"best": "accuracy"},
    }
    run = Run.create(tmp_path / "run", plan(tmp_path, **host))
    front, manifest = everything(run)
    checks = run.check_predictors()
    assert calls.count("profile") == 1 and front.noise == {"latency_ms@host-cpu": 0.0}
    assert {p.figures["latency_ms@host-cpu"].origin for p in front.points} == {"measured"}
    assert {p.predicted["latency_ms@host-cpu"].origin for p in front.points} == {"predicted"}
    latency = manifest["devices"]["host-cpu"]["latency_ms"]
    assert set(latency) == {"predicted", "measured"} and latency["measured"]["provenance"]["runtime"]
    assert checks["host-cpu"]["median_error"] < 0.05
    assert json.loads((run.folder / "devices" / "host-cpu.json").read_text())["report"]["networks"] >= 40
    calls.clear()
    again = Run.open(run.folder)
    assert everything(again) == (front, manifest) and again.check_predictors() == checks
    assert calls == []
    changed, device = again.profile(DeviceSettings("host-cpu", 64, 0.0))
    assert calls == ["profile"] and Run.open(run.folder).experiment == changed.experiment
    assert changed.experiment.devices == (DeviceSettings("host-cpu", 64, 0.0),)
    assert device.key != run.devices["host-cpu"].key


BOARD = """
import os, sys
size = os.path.getsize(sys.argv[1])
with open(sys.argv[2], "a") as log:
    log.write(f"{size}\\n")
print("warming up")
print(f"latency_ms: {0.1 + size * 1e-5}")
"""


def board(folder: Path) -> Path:
    """A device file with a command whose latency grows with the size of the model; it leaves a line a run."""
    (folder / "board.py").write_text(BOARD)
    described = yaml.safe_load((ROOT / "hardware_profiles" / "devices" / "host-cpu.yaml").read_text())
    command = f"{sys.executable} {folder / 'board.py'} {{model}} {folder / 'runs.txt'}"
    described["latency"] = {
        "origin": "measured",
        "source": "made up",
        "command": command,
        "repeats": 1,
        "anchor": False,
    }
    described |= {"name": "board", "title": "a board", "runtime": "its own"}
    (folder / "board.yaml").write_text(yaml.safe_dump(described))
    return folder / "board.yaml"


def test_a_command_is_run_by_profile_alone(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = board(tmp_path)
    with pytest.raises(BadExperiment, match="measured by a command, which only 'nas profile' runs: read it"):
        run.device(DeviceSettings(str(file), 48))
    assert main(["profile", str(run.folder), "--device", str(file), "--samples", "48"]) == 0
    out, err = capsys.readouterr()
    assert "each by the command: " in err and "board.py" in err and "board" in out
    visits = (tmp_path / "runs.txt").read_text().splitlines()
    assert 48 <= len(visits) <= 52
    joined = Run.open(run.folder)
    device = joined.devices["board"]
    assert device.predictor is not None and device.predictor.report()["within_10_percent"] > 0.9
    assert device.predictor.provenance["runtime"] == "its own" and device.predictor.provenance["cpu"] == "a board"
    with_search(joined, ["latency_ms@board<=100"]).search()  # by predictions
    assert joined.check_predictors() == {}
    assert (tmp_path / "runs.txt").read_text().splitlines() == visits
    assert main(["profile", str(run.folder), "--device", str(file), "--samples", "10"]) == 0
    assert "fitted on 10 measured subnets" in capsys.readouterr().out
    again = Run.open(run.folder).devices["board"].predictor
    assert again is not None and again.report()["networks"] == 10


def test_a_device_that_is_profiled_later_joins_the_run(run: Run) -> None:
    joined, device = run.profile(DeviceSettings("stm32h743"))
    assert device.name == "stm32h743"
    assert [d.name for d in Run.open(run.folder).experiment.devices][1:] == ["stm32h743"]
    assert set(joined.devices) == {"toy", "stm32h743"}


def test_a_run_keeps_the_device_files_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    monkeypatch.chdir(there)
    (there / "w12.yaml").write_text(tiny.device_yaml("toy", title="the first"))
    assert main(["train", str(tiny.write_experiment(there, devices=[{"name": "w12.yaml"}])), "--out", "run"]) == 0
    (there / "w12.yaml").write_text(tiny.device_yaml("toy", title="the second"))

    shutil.move(there / "run", elsewhere / "moved")
    monkeypatch.chdir(elsewhere)
    assert main(["search", "moved", "--trials", "4"]) == 0 and main(["pareto", "moved"]) == 0
    assert main(["profile", "moved", "--device", "toy"]) == 0
    assert "toy: the first" in capsys.readouterr().out
    assert main(["profile", "moved", "--device", "../there/w12.yaml"]) == 0
    assert "toy: the second" in capsys.readouterr().out
    assert Run.open("moved").experiment.devices == (DeviceSettings("toy"),)
    assert Run.open("moved").devices["toy"].profile.title == "the second"

    monkeypatch.chdir(there)
    longer = tiny.write_experiment(there, devices=[{"name": "w12.yaml", "samples": 7}])
    Run.create(elsewhere / "moved", read_experiment(longer))
    assert Run.open(elsewhere / "moved").settings_of("w12.yaml") == DeviceSettings("w12.yaml", samples=7)


def test_a_run_finds_its_data_from_any_folder_and_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    there, elsewhere = tmp_path / "there", tmp_path / "elsewhere"
    for folder in (there, elsewhere):
        folder.mkdir()
    digits = datasets.load_digits()
    images = (digits.images[:400] / 16.0 * 255).astype(np.uint8)
    np.savez(there / "small.npz", x_train=images, y_train=digits.target[:400])
    np.savez(there / "other.npz", x_train=images[::-1], y_train=digits.target[:400])
    sizes = {"calibration": 32, "val_search": 0.2}
    path = tiny.write_experiment(there, data={"path": "small.npz", **sizes})
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(path), "--out", "there/run"]) == 0
    monkeypatch.chdir(elsewhere)
    assert main(["search", "../there/run", "--trials", "4"]) == 0
    calls.clear()

    shutil.move(there / "small.npz", elsewhere / "moved.npz")
    (tmp_path / "linked").symlink_to(elsewhere)
    for named in ("moved.npz", "../linked/moved.npz"):
        assert main(["train", str(path), "--set", f"data.path={named}", "--out", "../there/run"]) == 0
        assert Run.open("../there/run").experiment.data.path == str(elsewhere.resolve() / "moved.npz")
    assert "step" not in calls
    for change in ("data.path=../there/other.npz", "data.calibration=48"):
        assert main(["train", str(path), "--set", "data.path=moved.npz", "--set", change, "--out", "../there/run"]) == 2
        assert "holds another experiment: data differ" in capsys.readouterr().err


def test_a_file_in_a_run_does_not_stand_for_a_shipped_device(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    for shipped in ("stm32f746", "host-cpu-4-threads"):
        planted = run.folder / "devices" / f"{shipped}.yaml"
        planted.write_text(tiny.device_yaml("toy"))
        assert main(["profile", str(run.folder), "--device", shipped]) == 2
        assert f"{planted}: the name '{shipped}' is that of a shipped device" in capsys.readouterr().err


def test_two_files_of_one_device_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    files = [tiny.write_device(tmp_path), tiny.write_device(tmp_path / "other")]
    with pytest.raises(BadExperiment, match="devices: toy is listed twice"):
        Run.create(tmp_path / "run", plan(tmp_path, devices=[{"name": str(file)} for file in files]))
    assert not (tmp_path / "run").exists()


def test_trust_trains_some_subnets_alone_and_keeps_its_report(
    run: Run, calls: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    report = run.trust(3)
    assert report.networks[0].architecture == str(run.space.smallest) and len(report.networks) == 3
    state = load_checkpoint(run.folder / "supernet")
    assert state is not None and report.steps == state[1]["step"] == calls.count("step") / 3
    assert report.settings["arithmetic"] == state[1]["arithmetic"] and report.seed == run.experiment.seed
    assert report.supernet_sha256 == run.evaluator.supernet_sha256
    held = json.loads((run.folder / "trust.json").read_text())
    assert held == report.to_dict() and "trust" in json.loads((run.folder / "stages.json").read_text())
    calls.clear()
    assert main(["trust", str(run.folder), "--networks", "3", "--format", "json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == held and calls == []
    assert (run.folder / "trust.png").stat().st_size > 5000 and "trust.png" in err
    picture = run.folder / "other.svg"
    assert main(["trust", str(run.folder), "--networks", "3", "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == str(report) and picture.is_file()
    assert main(["trust", str(run.folder), "--networks", "2"]) == 2
    assert "networks = 2; expected 3 to 64" in capsys.readouterr().err


def test_a_busy_machine_at_the_last_check_does_not_spoil_the_run(
    tmp_path: Path, machine: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise NoisyMachine("too slow just now")

    monkeypatch.setattr(importlib.import_module("nas.pipeline"), "check_predictor", refuse)
    host = {
        "devices": [{"name": "host-cpu", "samples": 60}],
        "search": {"objectives": ["accuracy", "latency_ms@host-cpu"], "trials": 8, "population": 4},
        "export": {"best": "accuracy"},
    }
    path = tiny.write_experiment(tmp_path, **host)
    assert main(["run", str(path), "--out", str(tmp_path / "run")]) == 0
    out, err = capsys.readouterr()
    assert "the predictors were not checked: too slow just now" in err
    assert "non-dominated subnets" in out and "fresh subnets" not in out


# the public interface ------------------------------------------------------------------------------------


def test_the_interface_reads_as_documented(tmp_path: Path, machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = nas.load_data("digits")
    space = MobileNet(
        resolutions=(8,),
        channels=data.channels,
        classes=len(data.classes),
        widths=(8, 16),
        depths=(1, 2),
        kernels=(3,),
        expansions=(2,),
        strides=(1, 2),
        precisions=("int8",),  # the MCU has no fp32
    )
    supernet = nas.Supernet(space)
    nas.train(supernet, data, strategy="sorted", epochs=2, seed=0, arithmetic="fp32")
    cpu = nas.profile(space, load_device("host-cpu"), samples=60, seed=0)
    mcu = nas.profile(space, load_device("stm32f746"))
    storage = optuna.storages.InMemoryStorage()
    front = nas.search(
        supernet,
        data,
        objectives=[nas.maximize("accuracy"), nas.minimize("latency_ms", cpu)],
        limits=[nas.at_most("sram_bytes", 327_680, mcu), nas.at_most("flash_bytes", 1_048_576, mcu)],
        trials=20,
        seed=0,
        storage=storage,
    )
    (study,) = storage.get_all_studies()
    trials = storage.get_all_trials(study._study_id, states=(optuna.trial.TrialState.COMPLETE,))
    stopped_early = sum("images_seen" in trial.user_attrs for trial in trials)  # these depend on measured latencies
    assert len(front.points) + len(front.others) + stopped_early == len(trials) == 20
    chosen = front.best("accuracy", {"latency_ms@host-cpu": 2.0})
    assert chosen["sram_bytes@stm32f746"] <= 327_680 and chosen["latency_ms@host-cpu"] <= 2.0
    manifest: Any = nas.export(supernet, chosen, data, "exports/")
    folder = tmp_path / "exports" / chosen.id
    assert (folder / "model.onnx").is_file() and set(manifest["precisions"].values()) == {"int8"}
    latency = manifest["devices"]["host-cpu"]["latency_ms"]
    assert latency["measured"]["latency_ms"] > 0
    assert latency["predicted"]["value"] == chosen["latency_ms@host-cpu"]
    knee, frame = front.knee(), front.to_frame()
    assert knee in front.points and len(frame) == len(front)
    assert front.hypervolume({"accuracy": 0.0, "latency_ms@host-cpu": 10.0}) > 0
    front.plot(tmp_path / "front.png")
    again = nas.remeasure(front, nas.Evaluator(supernet, data), {"host-cpu": cpu, "stm32f746": mcu})
    assert {p.figures["latency_ms@host-cpu"].origin for p in again.points} == {"measured"}


# deaths --------------------------------------------------------------------------------------------------


def start(path: Path, folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "nas.cli", "run", str(path), "--out", str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def killed_when(path: Path, folder: Path, reached: Callable[[], bool]) -> bool:
    """Start a run and kill it as soon as the condition holds; False when it ended before."""
    with start(path, folder) as child:
        try:
            deadline = time.monotonic() + 120
            while child.poll() is None and time.monotonic() < deadline:
                if reached():
                    child.send_signal(signal.SIGKILL)
                    return True
                time.sleep(0.005)
        finally:
            child.kill()
    return False


def test_a_folder_with_an_unfinished_first_write_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killed = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from hardware_profiles.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('name: ti')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", killed, str(folder / "experiment.yaml")]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    (left,) = folder.iterdir()
    (folder / "thesis.yaml").write_text("years of work")
    with pytest.raises(BadExperiment, match="is not empty and holds no experiment"):
        Run.create(folder, plan(tmp_path))
    (folder / "thesis.yaml").unlink()
    assert left.exists() and Run.create(folder, plan(tmp_path)).experiment == plan(tmp_path)
    assert Run.open(folder).experiment.name == "tiny"


@pytest.mark.slow
def test_a_run_killed_at_many_moments_ends_like_one_that_was_not(tmp_path: Path) -> None:
    path = tiny.write_experiment(tmp_path, train={"epochs": 6, "arithmetic": "fp32"})
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    with start(path, whole) as child:
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err

    def lines(name: str) -> int:
        return len((folder / name).read_text().splitlines()) if (folder / name).exists() else 0

    def grown(name: str, size: int) -> bool:
        return (folder / name).exists() and (folder / name).stat().st_size >= size

    def exporting() -> bool:
        return (folder / "exports").exists()

    moments: list[Callable[[], bool]] = [
        lambda: (folder / "experiment.yaml").exists(),
        lambda: lines("metrics.jsonl") >= 2,
        lambda: lines("metrics.jsonl") >= 5,
        lambda: (folder / "study.db").exists(),
        lambda: grown("study.db-wal", 400_000),
        lambda: grown("study.db-wal", 400_000) and time.time() - (folder / "study.db").stat().st_mtime > 1,
        lambda: (folder / "front.json").exists(),
        exporting,
    ]
    killed = [killed_when(path, folder, moment) for moment in moments]
    assert sum(killed) >= 6
    with start(path, folder) as child:
        resumed, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
    assert (folder / "front.json").read_bytes() == (whole / "front.json").read_bytes()
    assert resumed.replace(str(folder), "") == out.replace(str(whole), "")
    ids = [next((f / "exports").glob("[!.]*")) for f in (whole, folder)]
    assert ids[0].name == ids[1].name
    assert (ids[0] / "model.onnx").read_bytes() == (ids[1] / "model.onnx").read_bytes()
    assert metrics(folder) == metrics(whole)


def test_an_export_that_died_halfway_is_made_anew(run: Run, tmp_path: Path) -> None:
    front, manifest = everything(run)
    exported = run.folder / "exports" / manifest["id"]
    (exported / "manifest.json").unlink()
    _, again = run.export(run.chosen(front))
    assert again == manifest and (exported / "manifest.json").is_file()
    other = replace(run.chosen(front), id="0" * 10, architecture=str(run.space.smallest))
    assert np.isclose(run.export(other, tmp_path / "elsewhere")[1]["macs"], run.space.lower(run.space.smallest).macs)
