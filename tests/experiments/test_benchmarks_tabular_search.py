"""The benchmark of searches in a table, on a made-up one: shares against counted cells, and what is not repeated."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest

OPTIONS = ("none", "skip", "conv")
OBJECTIVES = ("--objective", "acc:max", "--objective", "ms:min")


@pytest.fixture(scope="module")
def module(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("tabular_search")


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """243 architectures, whose figures are whole numbers so that volumes can be counted."""
    rng = np.random.default_rng(4)
    codes = np.array(list(itertools.product(range(3), repeat=5)))
    size = codes @ [3, 2, 2, 1, 1]
    found = pd.DataFrame(np.array(OPTIONS)[codes], columns=[f"op_{i}" for i in range(5)])
    found["acc"] = 60 + size + rng.integers(0, 6, len(codes))
    found["ms"] = 5 + size + rng.integers(0, 6, len(codes))
    found["test"] = found["acc"] - 2 + rng.integers(-3, 4, len(codes))
    found["name"] = [f"a{i // 2}" for i in range(len(codes))]
    return found.sample(frac=1.0, random_state=1).reset_index(drop=True)


@pytest.fixture
def table(frame: pd.DataFrame, tmp_path: Path) -> Path:
    path = tmp_path / "table.csv.gz"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture
def run(
    module: ModuleType, table: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Arguments -> the JSON on stdout; LINAS with fewer candidates and smaller grids."""
    linas = __import__("linas")
    for name, value in (("PREDICTED", 400), ("ALPHAS", [1.0]), ("COSTS", [10.0])):
        monkeypatch.setattr(linas, name, value)

    def called(*arguments: str) -> dict[str, Any]:
        out = table.with_name("found.json")
        everything = ["--table", str(table), "--architecture-columns", "op_*", *OBJECTIVES, *arguments]
        capsys.readouterr()
        assert module.main([*everything, "--json", "--out", str(out)]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads(out.read_text(encoding="utf-8"))
        return dict(printed)

    return called


def cells(frame: pd.DataFrame, signal: str, best: int, worst: float, slowest: float) -> int:
    """Unit squares between a reference and (best, 0 ms) that a row is at least as good as."""
    rows = [(a, ms) for a, ms in zip(frame[signal], frame["ms"], strict=True) if a > worst and ms < slowest]
    squares = itertools.product(range(int(worst) + 1, best + 1), range(int(slowest)))
    return sum(any(a >= accuracy and ms <= latency for a, ms in rows) for accuracy, latency in squares)


@pytest.mark.parametrize("signal", ["acc", "test"])
def test_shares_are_those_of_counted_cells(
    module: ModuleType, frame: pd.DataFrame, run: Callable[..., dict[str, Any]], signal: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    rows = {seed: np.random.default_rng(seed).integers(0, 243, 30).tolist() for seed in range(3)}
    monkeypatch.setitem(module.METHODS, "drawn", lambda table, budget, seed: rows[seed][:budget])
    report = ["--report", "test:max"] if signal == "test" else []
    references = ["--reference", f"{signal}:62", "--reference", "ms:20"]
    found = run(*report, *references, "--methods", "drawn", "--budgets", "30,7", "--seeds", "3")
    whole = cells(frame, signal, 90, 62, 20)
    told = found["methods"]["drawn"]
    assert list(told["hypervolume_share"]) == ["7", "30"]
    for budget, (mean, deviation) in told["hypervolume_share"].items():
        shares = [cells(frame.iloc[rows[s][: int(budget)]], signal, 90, 62, 20) / whole for s in range(3)]
        assert mean == pytest.approx(fmean(shares), abs=2e-5)
        assert deviation == pytest.approx(pstdev(shares), abs=2e-5)
    assert told["unique_share"] == pytest.approx(fmean(len(set(r)) / 30 for r in rows.values()), abs=1e-4)
    assert found["objectives"][0].startswith("acc:max, reference ")
    assert found["reported"] == [f"{signal}:max, reference 62", "ms:min, reference 20"]


def test_all_methods_in_the_shape_that_is_promised(
    module: ModuleType, run: Callable[..., dict[str, Any]], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--budgets", "20,110", "--seeds", "2", "--methods", "ours,linas,linas_unique,nsga2,tpe,random")
    found = run(*asked)
    assert list(found["methods"]) == ["ours", "linas", "linas_unique", "nsga2", "tpe", "random"]
    for method in found["methods"].values():
        assert set(method) == {"hypervolume_share", "unique_share", "seconds", "evaluations_for_linas"}
        (few, _), (many, spread) = method["hypervolume_share"]["20"], method["hypervolume_share"]["110"]
        assert 0 < few <= many <= 1 and spread >= 0 and method["seconds"] >= 0
    unique = {name: method["unique_share"] for name, method in found["methods"].items()}
    assert unique["ours"] == 1 and unique["linas"] < 0.95 and unique["random"] < 0.95
    shares = {name: method["hypervolume_share"]["110"][0] for name, method in found["methods"].items()}
    assert shares["ours"] == max(shares.values()) > 0.95
    assert found["architectures"] == 243 and found["table"] == table.name and found["seeds"] == [0, 1]
    lines = table.with_name("found_runs.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12
    for name in module.METHODS:  # what has its line is not searched again
        monkeypatch.setitem(module.METHODS, name, lambda table, budget, seed: pytest.fail("was done"))
    assert run(*asked)["methods"] == found["methods"]


def test_a_search_that_ended_is_done_again_for_other_budgets_references_and_classes(
    module: ModuleType, run: Callable[..., dict[str, Any]], table: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(module.METHODS, "fixed", lambda table, budget, seed: list(range(budget)))

    def lines() -> int:
        return len(table.with_name("found_runs.jsonl").read_text(encoding="utf-8").splitlines())

    common = ("--methods", "fixed", "--seeds", "1")
    for count, changed in enumerate(
        (
            ("--budgets", "10"),
            ("--budgets", "20"),
            ("--budgets", "20", "--reference", "ms:20"),
            ("--budgets", "20", "--canonical", "name"),
        ),
        start=1,
    ):
        run(*common, *changed)
        assert lines() == count
    run(*common, "--budgets", "20", "--canonical", "name")
    assert lines() == count
    changed = pd.read_csv(table)
    changed.loc[7, "ms"] += 1
    changed.to_csv(table, index=False)
    run(*common, "--budgets", "20", "--canonical", "name")
    assert lines() == count + 1


@pytest.fixture
def small(module: ModuleType, frame: pd.DataFrame, tmp_path: Path) -> Callable[..., Any]:
    """Rows of the frame and arguments -> the table as searches see it."""

    def read(rows: pd.DataFrame, *arguments: str) -> Any:
        path = tmp_path / "some.csv"
        rows.to_csv(path, index=False)
        base = ["--table", str(path), "--architecture-columns", "op_*", *OBJECTIVES]
        return module.read_table(module.parsed([*base, *arguments]))[0]

    return read


def test_ours_evaluates_one_of_each_class_and_only_what_the_table_has(
    module: ModuleType, frame: pd.DataFrame, small: Callable[..., Any]
) -> None:
    some = frame.iloc[:150].reset_index(drop=True)
    table = small(some, "--canonical", "name")
    classes = some["name"].nunique()
    assert classes < 150
    rows = module.guided(table, classes, 0)
    assert len(rows) == some.loc[rows, "name"].nunique() == classes
    assert sorted(module.guided(small(some), 150, 1)) == list(range(150))


def test_an_evaluation_that_is_repeated_is_an_error(
    module: ModuleType, frame: pd.DataFrame, small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "asked_of", lambda *_: [3, 4, 3])
    with pytest.raises(AssertionError, match="1 of 3 evaluations were repeated"):
        module.guided(small(frame), 3, 0)


def test_what_is_asked_for_is_the_row_of_those_choices_or_the_nearest(
    module: ModuleType, frame: pd.DataFrame, small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options are numbered in the order of their names, costs are what is minimized, and samplers are told them."""
    some = frame.iloc[:150].reset_index(drop=True)
    table = small(some)
    ordered = sorted(OPTIONS)
    for place, row in some.iterrows():
        codes = np.array([ordered.index(row[f"op_{i}"]) for i in range(5)])
        assert table.place(codes) == place
        assert table.costs[place].tolist() == [-row["acc"], row["ms"]]
    lacking = frame.iloc[150]
    codes = np.array([ordered.index(lacking[f"op_{i}"]) for i in range(5)])
    apart = [sum(row[f"op_{i}"] != lacking[f"op_{i}"] for i in range(5)) for _, row in some.iterrows()]
    assert table.place(codes) == int(np.argmin(apart)) and min(apart) > 0
    assert table.has(np.stack([codes, table.codes[7]])).tolist() == [False, True]

    studies = []
    create = module.optuna.create_study

    def kept(**settings: Any) -> Any:
        studies.append(create(**settings))
        return studies[-1]

    monkeypatch.setattr(module.optuna, "create_study", kept)
    rows = module.METHODS["random"](table, 12, 0)
    for trial, place in zip(studies[0].trials, rows, strict=True):
        assert trial.values == [-some["acc"][place], some["ms"][place]]
        drawn = np.array([ordered.index(trial.params[f"choice0{i}"]) for i in range(5)])
        assert table.place(drawn) == place


def test_columns_of_many_numbers_are_numbers_and_rows_with_gaps_are_left_out(small: Callable[..., Any]) -> None:
    frame = pd.DataFrame({"op_a": range(20), "op_b": ["x", "y"] * 10, "acc": range(20), "ms": range(20, 0, -1)})
    frame["acc"] = frame["acc"].where(frame.index != 4)
    table = small(frame)
    assert len(table.codes) == 19 and table.numeric == (True, False)
    assert [type(d).__name__ for d in table.distributions.values()] == ["IntDistribution", "CategoricalDistribution"]


def test_the_digest_is_of_all_that_a_search_sees(small: Callable[..., Any], frame: pd.DataFrame) -> None:
    fewer = frame[frame["op_4"] == frame["op_4"].iloc[0]]
    tables = [small(fewer), small(fewer, "--report", "test:max"), small(fewer, "--canonical", "name")]
    tables += [small(fewer, "--reference", "ms:20"), small(fewer.assign(acc=fewer["acc"] + 1)), small(fewer[::-1])]
    tables += [small(fewer.assign(op_0=fewer["op_0"] + "x")), small(fewer.rename(columns={"op_4": "op_5"}))]
    plain = tables[0]
    tables[:0] = [
        replace(plain, numeric=tuple(not one for one in plain.numeric)),
        replace(plain, reported=plain.costs + 1),
    ]
    digests = [each.digest for each in tables]
    assert len(set(digests[:-1])) == len(digests) - 1
    assert digests[-1] == plain.digest  # names of columns are not seen


def test_the_worst_that_counts_is_what_nearly_all_are_better_than(small: Callable[..., Any]) -> None:
    frame = pd.DataFrame({"op_a": [f"o{i:03}" for i in range(101)], "acc": range(101), "ms": range(200, 301)})
    table = small(frame)
    assert table.reference.tolist() == pytest.approx([-1.0, 299.0])
    frame["test"] = frame["acc"] / 2
    table = small(frame, "--report", "test:max", "--reference", "acc:10")
    assert table.reference[0] == -10 and table.reported_reference[0] == -10  # by the name of its objective
    table = small(frame, "--report", "test:max", "--reference", "test:7")
    assert table.reference[0] == pytest.approx(-1) and table.reported_reference[0] == -7


def test_columns_of_another_table_are_joined_by_one_that_both_have(small: Callable[..., Any], tmp_path: Path) -> None:
    frame = pd.DataFrame({"op_a": ["x", "y", "z"], "acc": [1.0, 2, 3]})
    other = pd.DataFrame({"op_a": ["z", "x", "y"], "ms": [30.0, 10, 20], "acc": [7, 7, 7]})
    other.to_csv(tmp_path / "other.csv", index=False)
    table = small(frame, "--join", str(tmp_path / "other.csv"), "--on", "op_a")
    assert table.costs.tolist() == [[-1, 10], [-2, 20], [-3, 30]]


def test_the_front_of_many_rows_is_that_of_all_pairs(module: ModuleType, rng: np.random.Generator) -> None:
    costs = rng.integers(0, 60, (1700, 2)).astype(float)
    expected = {
        tuple(row) for row in costs.tolist() if not any(((costs <= row).all(axis=1)) & ((costs < row).any(axis=1)))
    }
    found = module.front_of(costs)
    assert {tuple(row) for row in found.tolist()} == expected and len(found) == len(expected)


def test_evaluations_for_what_linas_reaches_are_the_first_that_do(module: ModuleType) -> None:
    def line(method: str, *shares: float) -> dict[str, Any]:
        told = dict(zip(("10", "20", "30"), shares, strict=True))
        return {"item": {"method": method}, "shares": told, "unique_share": 1.0, "seconds": 1.0}

    lines = [line("ours", 0.3, 0.8, 0.9), line("ours", 0.5, 1.0, 1.0), line("linas", 0.2, 0.4, 0.96)]
    found = module.summary(lines, ["ours", "linas"], [20, 30])
    assert found["ours"]["evaluations_for_linas"] == {"20": 10, "30": None}
    assert found["linas"]["evaluations_for_linas"] == {"20": 20, "30": 30}
    assert found["ours"]["hypervolume_share"]["20"] == pytest.approx([0.9, 0.1])
    assert "evaluations_for_linas" not in module.summary(lines, ["ours"], [20])["ours"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--table", "nowhere.csv"), "nowhere.csv cannot be read"),
        (("--architecture-columns", "arch_*"), "no architecture column matches 'arch_*'"),
        (("--objective", "acc"), "'acc': expected NAME:max or NAME:min"),
        (("--objective", "acc:best"), "expected NAME:max or NAME:min"),
        (("--objective", "joules:min"), "no column of numbers 'joules'"),
        (("--objective", "name:min"), "no column of numbers 'name'"),
        (("--report", "test:min", "--report", "test:min"), "no objective of its direction is left"),
        (("--reference", "acc"), "expected NAME:NUMBER"),
        (("--reference", "test:50"), "--reference for test"),
        (("--reference", "acc:1e9"), "nothing in the table is better than the reference"),
        (("--reference", "acc:nan"), "nothing in the table is better than the reference"),
        (("--canonical", "cell"), "no column 'cell'"),
        (("--architecture-columns", "op_0,op_1"), "several rows have the same"),
        (("--join", "nowhere.csv", "--on", "name"), "nowhere.csv cannot be read"),
        (("--methods", "ours,magic"), "no method 'magic'"),
        (("--budgets", "10,many"), "--budgets '10,many'"),
        (("--budgets", "0,10"), "expected at least 1 of each"),
        (("--budgets", "244"), "no more evaluations than the 243 architectures"),
        (("--budgets", "150", "--canonical", "name"), "no more evaluations than the 122 architectures"),
        (("--seeds", "0"), "0 seeds"),
        (("--workers", "0"), "0 workers"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_line(
    module: ModuleType, table: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], told: str
) -> None:
    base = ["--table", str(table), "--architecture-columns", "op_*", *OBJECTIVES, "--budgets", "10", "--seeds", "1"]
    out = table.with_name("none.json")
    assert module.main([*base, "--out", str(out), *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("tabular_search: ") and printed.err.count("\n") == 1 and told in printed.err
    assert not printed.out and not out.exists()


@pytest.mark.parametrize("content", ["", "op_0,op_1,acc,ms\n", "op_0,acc,ms\nx,1,\n", b"\x1f\x8b\x08\x00"])
def test_tables_without_rows_and_broken_ones_are_told_of(
    module: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | bytes
) -> None:
    path = tmp_path / "broken.csv.gz"
    path.write_bytes(content if isinstance(content, bytes) else gzip.compress(content.encode()))
    assert module.main(["--table", str(path), "--architecture-columns", "op_*", *OBJECTIVES]) == 2
    assert capsys.readouterr().err.startswith("tabular_search: ")


def test_without_json_there_is_a_line_for_each_method(
    module: ModuleType, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--table", str(table), "--architecture-columns", "op_*", *OBJECTIVES, "--budgets", "5", "--seeds", "1"]
    assert module.main([*base, "--methods", "random,nsga2", "--out", str(table.with_name("x.json"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["method", "random", "nsga2"]
