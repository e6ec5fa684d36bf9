"""Fronts of studies and tables that others made."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import optuna
import pytest

from nas.costs import Limit, Objective, UnknownFigure, maximize, minimize
from nas.front import ParetoFront
from nas.front_sources import read_objective

TABLE = "id,op_0,op_1,acc,ms,params\na,0,1,90,5,7\nb,1,1,80,2,3\nc,1,0,70,4,1\nd,0,0,95,9,20\n"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "table.csv"
    path.write_text(TABLE)
    return path


def ids(front: ParetoFront) -> list[str]:
    return [point.id for point in front.points]


# tables ----------------------------------------------------------------------------------------------------


def test_a_table_becomes_a_front_of_columns_with_any_name(table: Path, tmp_path: Path) -> None:
    front = ParetoFront.from_csv(table, ["acc:max", "ms:min"], architecture_columns=["op_*"])
    assert ids(front) == ["b", "a", "d"] and [point.id for point in front.others] == ["c"]
    assert front.points[1].architecture == "op_0=0,op_1=1" and front.points[1]["acc"] == 90
    assert front.best("acc", {"ms": 6}).id == "a" and front.best("ms", {"acc": 85}).id == "a"
    assert ids(front.filter([front.limit("ms >= 4")])) == ["a", "d"]
    packed = tmp_path / "table.csv.gz"
    packed.write_bytes(gzip.compress(TABLE.encode()))
    assert ids(ParetoFront.from_csv(packed, ["acc:max", "ms:min"])) == ["b", "a", "d"]
    front.save(tmp_path / "front.json")
    assert ParetoFront.load(tmp_path / "front.json") == front


def test_limits_on_other_columns_decide_before_the_front_and_survive_a_file(table: Path, tmp_path: Path) -> None:
    front = ParetoFront.from_csv(table, ["acc:max", "ms:min"], limits=["params<=2", Limit("ms", "<=", 8, foreign=True)])
    assert ids(front) == ["c"] and front.points[0]["params"] == 1
    front.save(tmp_path / "front.json")
    assert ParetoFront.load(tmp_path / "front.json") == front


def test_our_own_figures_keep_their_units(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("architecture,accuracy,latency_ms@cpu\nw=1,0.5,2\nw=2,0.6,3\n")
    front = ParetoFront.from_csv(path, ["accuracy", "latency_ms@cpu"])
    assert front.objectives == (maximize("accuracy"), minimize("latency_ms", "cpu"))
    assert ids(front) == ["line2", "line3"] and front.points[0].architecture == "w=1"
    assert ids(front.filter([front.limit("latency_ms@cpu<=2500us")])) == ["line2"]


@pytest.mark.parametrize(
    ("text", "objectives", "said"),
    [
        (TABLE.replace("70", "seventy"), ["acc:max"], "line 4: acc: expected a finite number, got 'seventy'"),
        (TABLE.replace("70", ""), ["acc:max"], "line 4: acc: expected a finite number, got ''"),
        (TABLE.replace("70", "nan"), ["acc:max"], "line 4: acc"),
        (TABLE + "e,1\n", ["acc:max"], "line 6: expected 6 cells as in the header, got 2"),
        (TABLE, ["speed:max"], "has no column 'speed'; it has id, op_0"),
        (TABLE, ["speed"], "speed:max or :min"),
        (TABLE, ["acc:max", "acc:max"], "each of them once"),
        (TABLE, [], "expected one or more"),
        (TABLE.replace("acc", "ms"), ["ms:max"], "line 1: two columns are called 'ms'"),
        (TABLE.replace("acc", "accuracy"), ["accuracy"], "line 2: accuracy: expected a share from 0 to 1"),
        ("", ["acc:max"], "empty file"),
    ],
)
def test_a_table_that_cannot_be_read_is_refused_with_the_line(
    text: str, objectives: list[str], said: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        ParetoFront.from_csv(path, objectives)
    assert said in str(error.value)


def test_a_broken_archive_and_unknown_columns_are_refused(table: Path, tmp_path: Path) -> None:
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(TABLE.encode())[:30])
    with pytest.raises(ValueError, match="gzip-compressed"):
        ParetoFront.from_csv(tmp_path / "x.csv.gz", ["acc:max"])
    for options in ({"id_column": "nom"}, {"architecture_columns": ["nom_*"]}):
        with pytest.raises(ValueError, match="has no column 'nom"):
            ParetoFront.from_csv(table, ["acc:max"], **options)  # type: ignore[arg-type]
    for limit in ("params<=5KiB", "params<=x", "nom<=3"):
        with pytest.raises(ValueError, match=r"params|nom"):
            ParetoFront.from_csv(table, ["acc:max"], limits=[limit])


def test_nas_bench_201_has_the_front_that_pandas_finds(data_folder: Path) -> None:
    import pandas as pd

    path = data_folder / "nasbench201_cifar10.csv.gz"
    frame = pd.read_csv(path).sort_values(["macs_cifar10", "c10_valid_200"], ascending=[True, False])
    best_before = frame["c10_valid_200"].cummax().shift(fill_value=-np.inf)
    expected = frame[frame["c10_valid_200"] > best_before]
    front = ParetoFront.from_csv(path, ["c10_valid_200:max", "macs_cifar10:min"], id_column="arch_idx")
    assert ids(front) == [str(i) for i in expected["arch_idx"]]


# studies ---------------------------------------------------------------------------------------------------


def study(**options: object) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(directions=["maximize", "minimize"], **options)  # type: ignore[arg-type]


def add(made: optuna.Study, values: list[float], depth: int, violation: float | None = None, **attrs: object) -> None:
    trial = optuna.trial.create_trial(
        params={"depth": depth},
        distributions={"depth": optuna.distributions.IntDistribution(0, 9)},
        values=values,
        user_attrs=dict(attrs),
        constraints={"size": violation} if violation is not None else None,
    )
    made.add_trial(trial)


def test_any_study_becomes_a_front() -> None:
    made = study()
    add(made, [0.9, 5], 3, 0.0)  # just met
    add(made, [0.8, 6], 2, -1.0)
    add(made, [0.99, 1], 9, 0.5)  # beyond a constraint
    add(made, [float("inf"), 1], 8)
    made.ask()  # unfinished
    front = ParetoFront.from_study(made)
    assert front.objectives == (
        Objective("value_0", "maximize", foreign=True),
        Objective("value_1", "minimize", foreign=True),
    )
    assert ids(front) == ["trial0"] and [e.id for e in front.others] == ["trial1", "trial2"]
    assert front.points[0].architecture == "depth=3" and front.points[0]["value_1"] == 5
    named = ParetoFront.from_study(made, ["accuracy", "latency_ms@cpu"])
    assert named.best("accuracy")["latency_ms@cpu"] == 5
    with pytest.raises(ValueError, match="would maximize, minimize"):
        ParetoFront.from_study(made, ["accuracy"])


def test_a_study_of_ours_brings_its_figures_and_wants_its_objectives() -> None:
    made = study()
    figure = {"low": None, "high": None, "origin": "predicted"}
    held = {"accuracy": {"value": 0.9, **figure}, "macs": {"value": 7.0, **figure}}
    add(made, [0.9, 7], 3, architecture="w=3", figures=held)
    add(made, [0.0, 1], 1, 2.0, architecture="w=1", figures={"macs": held["macs"]})  # refused unseen
    with pytest.raises(ValueError, match="give them in order"):
        ParetoFront.from_study(made)
    front = ParetoFront.from_study(made, ["accuracy", "macs"])
    assert len(front.others) == 0 and front.points[0].architecture == "w=3"
    assert front.points[0].figures["accuracy"].origin == "predicted"


def test_objectives_as_text() -> None:
    assert read_objective("my acc: x:max") == Objective("my acc: x", "maximize", foreign=True)
    assert read_objective("macs") == minimize("macs")
    with pytest.raises(UnknownFigure, match="accuracy:maxx: expected accuracy:max or accuracy:min, got the direction"):
        read_objective("accuracy:maxx")
    with pytest.raises(UnknownFigure, match="needs its direction"):
        read_objective("acc")
