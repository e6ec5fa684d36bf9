"""Experiments: YAML to values, and one line for every mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.config import BadExperiment, Experiment, load_experiment, read_experiment, recipe_names
from tests.nas import tiny


def write(folder: Path, content: object) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_and_survive_their_own_file(name: str, tmp_path: Path) -> None:
    experiment = load_experiment(name)
    assert experiment.name == name
    again = read_experiment(write(tmp_path, experiment.to_dict() | {"versions": {"python": "3"}}))
    assert again == experiment
    assert "accuracy" in [objective.key for objective in experiment.search.parsed_objectives]


def test_values_are_read_and_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, tiny.experiment(tmp_path))
    given = ["train.epochs=3", "data.val_search=200", "search.limits=[macs<=5M]", "search.confidence=0.95", "seed=7"]
    experiment = load_experiment(str(path), given)
    assert experiment.train.epochs == 3 and experiment.seed == 7
    assert experiment.data.val_search == 200.0
    assert [str(limit) for limit in experiment.search.parsed_limits] == ["macs<=5000000"]
    assert experiment.search.settings.trials == 24 and experiment.search.settings.population == 6
    assert experiment.space["family"] == "mobilenet"
    content = tiny.experiment(tmp_path)
    content["train"] = None
    assert load_experiment(str(write(tmp_path, content)), ["train.epochs=4"]).train.epochs == 4


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
    ({"train": {"epoch": 3}}, "unknown key 'train.epoch'; did you mean 'epochs'?"),
    ({"train": {"epochs": "many"}}, "train.epochs: expected int, got 'many'"),
    ({"train": {"epochs": True}}, "train.epochs: expected int, got True"),
    ({"train": {"epochs": 0}}, "train.epochs = 0; expected more than 0"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate: expected float, got nan"),
    ({"train": 5}, "train: expected keys, got 5"),
    ({"data": {}}, "missing key 'data.path'; set it in the YAML file or with --set data.path=..."),
    ({"data": {"path": "digits", "train_share": 2}}, "data: train_share = 2.0; expected a share above 0"),
    (
        {"data": {"path": "digits", "coreset": "best"}},
        "data: coreset = 'best'; expected one of random, dataset_quantization",
    ),
    ({"space": {"widths": [8]}}, "space.family is missing"),
    ({"space": {"family": ["mobilenet"]}}, "space.family is missing"),
    ({"space": {"family": "mobilenet", 3: 4}}, "expected names as keys, got 3"),
    ({"space": "mobilenet"}, "space: expected keys, got 'mobilenet'"),
    ({"name": "../elsewhere"}, "expected letters, digits, '.', '_' and '-', got '../elsewhere'"),
    ({"name": ""}, "expected letters"),
    ({"seed": -1}, "seed: expected 0 or more, got -1"),
    ({"devices": {"name": "host-cpu"}}, "devices: expected a list"),
    ({"devices": [{"name": "host-cpu"}, {"name": "host-cpu"}]}, "host-cpu is listed twice"),
    ({"devices": [{"name": "host-cpu", "samples": 3}]}, "samples = 3; expected 4 or more"),
    ({"devices": [{"name": "host-cpu", "error": 1.5}]}, "error = 1.5; expected a share such as 0.05"),
    ({"search": {"objectives": ["latency_ms"]}}, "latency_ms belongs to a device"),
    ({"search": {"objectives": ["acuracy"]}}, "did you mean 'accuracy'?"),
    ({"search": {"objectives": []}}, "0 objectives; expected one to four"),
    ({"search": {"objectives": ["macs", "macs"]}}, "macs is given twice"),
    ({"search": {"limits": ["macs<=5KiB"]}}, "macs is in macs, not 'KiB'"),
    ({"search": {"confidence": 0.9}}, "only 0.95 can be asked for"),
    ({"search": {"sampler": "cma"}}, "expected one of guided, nsga2, nsga3, tpe, gp, random"),
    ({"search": {"trials": 1}}, "expected at least 2"),
    ({"export": {"best": "precision"}}, "unknown figure 'precision'"),
    ({"export": {"limits": ["int8_macs_share>=50"]}}, "is a fraction from 0 to 1"),
]


@pytest.mark.parametrize(("change", "said"), MISTAKES, ids=[said[:40] for _, said in MISTAKES])
def test_a_mistake_is_told_in_one_line(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(BadExperiment) as caught:
        read_experiment(write(tmp_path, tiny.experiment(tmp_path) | change))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1", "", "\x00", "name: !!python/object/apply:os.getcwd []"])
def test_what_is_not_such_a_file_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(BadExperiment, match=re.escape("experiment.yaml")):
        read_experiment(write(tmp_path, text))


def test_unknown_recipes_and_bad_overrides(tmp_path: Path) -> None:
    with pytest.raises(BadExperiment, match="no experiment 'quickstrat'; did you mean 'quickstart'"):
        load_experiment("quickstrat")
    path = str(write(tmp_path, tiny.experiment(tmp_path)))
    for override, said in [
        ("train.epochs", "expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("name.first=3", "'name' holds a value, not keys"),
        ("train.epochs=[", "--set"),
        ("train.epoch=3", "did you mean 'epochs'"),
    ]:
        with pytest.raises(BadExperiment, match=re.escape(said)):
            load_experiment(path, [override])


def test_an_override_replaces_the_whole_list_of_devices() -> None:
    devices = load_experiment("quickstart", ["devices=[{name: host-cpu, samples: 10}, {name: stm32f746}]"]).devices
    assert [(device.name, device.samples) for device in devices] == [("host-cpu", 10), ("stm32f746", 120)]
    for key in ("devices[0].samples", "devices.0.samples", "devices[0]", "devices.0", "devices.samples"):
        with pytest.raises(BadExperiment, match="devices is a list, which is only given as a whole") as caught:
            load_experiment("quickstart", [f"{key}=10"])
        shown = re.search(r'--set "(devices=.*)"$', str(caught.value))
        assert shown and len(load_experiment("quickstart", [shown[1]]).devices) == 2
    with pytest.raises(BadExperiment, match=re.escape('--set "search.limits=[macs<=5M]"')):
        load_experiment("quickstart", ["search.limits[0]=macs<=3M"])
    with pytest.raises(BadExperiment, match=re.escape('--set "space.widths=[FIRST, SECOND]"')):
        load_experiment("quickstart", ["space.widths[1]=8"])


def test_data_is_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tmp_path.resolve()
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.chdir(here)

    def path_of(named: str, *overrides: str) -> str:
        write(there, tiny.experiment(tmp_path, data={"path": named}))
        return load_experiment("../there/experiment.yaml", overrides).data.path

    assert path_of("images") == path_of("./images/") == path_of("../there/images") == str(there / "images")
    assert path_of("images", "train.epochs=3") == str(there / "images")
    assert path_of("images", "data.path=images") == str(here / "images")
    assert path_of("images", "data={path: ../images}") == str(tmp_path / "images")
    assert path_of(str(tmp_path / "images")) == str(tmp_path / "images")
    assert path_of("digits") == path_of("images", "data.path=digits") == "digits"
    assert path_of("digits", "data.path=./digits") == str(here / "digits")
    with pytest.raises(BadExperiment, match=re.escape("data.path: expected str, got 3")):
        path_of("images", "data.path=3")
    assert load_experiment("cifar10").data.path == str(here / "cifar10.npz")  # not beside the shipped file

    def devices_of(names: list[str], *overrides: str) -> list[str]:
        write(there, tiny.experiment(tmp_path, devices=[{"name": name} for name in names]))
        return [device.name for device in load_experiment("../there/experiment.yaml", overrides).devices]

    assert devices_of(["mine.yaml", "host-cpu"]) == [str(there / "mine.yaml"), "host-cpu"]
    assert devices_of(["../a/mine.yml"], "devices=[{name: ./mine.yaml}]") == [str(here / "mine.yaml")]


def test_equal_files_are_equal_experiments(tmp_path: Path) -> None:
    path = write(tmp_path, tiny.experiment(tmp_path))
    first, second = (read_experiment(path) for _ in range(2))
    assert first == second and isinstance(first, Experiment)
