"""Dominance, hypervolume, queries and files of fronts, against brute force and hand-written numbers."""

from __future__ import annotations

import io
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nas.costs import Figure, Infeasible, Limit, UnknownFigure, at_least, at_most, maximize, minimize
from nas.front import Evaluation, ParetoFront, dominated, hypervolume, nearest_message, to_dict

OBJECTIVES = (maximize("accuracy"), minimize("latency_ms", "cpu"))


def point(name: str, accuracy: float, latency_ms: float, macs: float = 1.0) -> Evaluation:
    figures = {
        "accuracy": Figure(accuracy, accuracy - 0.01, accuracy + 0.01, "measured"),
        "latency_ms@cpu": Figure(latency_ms, None, None, "predicted"),
        "macs": Figure.exact(macs),
    }
    return Evaluation(name, f"width={name}", figures, {"stem": "int8"})


POINTS = [
    point("a", 0.70, 1.0, 5),
    point("b", 0.80, 2.0, 4),
    point("c", 0.79, 3.0, 3),  # dominated by b
    point("d", 0.90, 4.0, 2),
    point("e", 0.905, 9.0, 1),
]


@pytest.fixture
def front() -> ParetoFront:
    return ParetoFront.of(POINTS, OBJECTIVES, space="toy", supernet_sha256="abc")


# dominance -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_without_noise_dominance_is_that_of_brute_force(objectives: int, rng: np.random.Generator) -> None:
    for _ in range(20):
        costs = rng.integers(0, 6, (30, objectives)).astype(float)
        lost = dominated(costs)
        for i, row in enumerate(costs):
            beaten = any((other <= row).all() and (other < row).any() for other in costs)
            assert lost[i] or not beaten
            if lost[i]:
                kept = costs[~lost]
                assert any((other <= row).all() for other in kept)
        assert len(np.unique(costs[~lost], axis=0)) == (~lost).sum()  # of equal rows one is kept


@pytest.mark.parametrize("objectives", [2, 3])
def test_with_noise_the_kept_rows_differ_by_more_and_none_is_lost_for_nothing(
    objectives: int, rng: np.random.Generator
) -> None:
    noise = np.array([0.02, 0.1, 0.05])[:objectives]
    for _ in range(60):
        costs = rng.uniform(1.0, 1.5, (25, objectives))
        lost = dominated(costs, noise)
        kept = costs[~lost]
        for a, b in itertools.permutations(kept, 2):
            margin = noise * np.maximum(a, b)
            assert (np.abs(a - b) > margin).any()
            assert (a > b + margin).any()  # a is not as good as b everywhere within the noise
        for row in costs[lost]:
            within = [(other <= row + noise * np.maximum(other, row)).all() for other in kept]
            reverse = [(row <= other + noise * np.maximum(other, row)).all() for other in kept]
            assert any(within) or any(reverse)


def test_a_lead_within_the_noise_counts_for_nothing() -> None:
    costs = np.array([[1.00, 10.0], [1.01, 5.0], [1.00, 5.1]])
    assert dominated(costs).tolist() == [True, False, False]
    assert dominated(costs, np.array([0.05, 0.05])).tolist() == [True, True, False]
    assert dominated(np.array([[1.0, 10.0], [1.2, 9.0]]), np.array([0.05, 0.2])).tolist() == [False, True]


# hypervolume ---------------------------------------------------------------------------------------------


def test_hypervolume_of_boxes() -> None:
    assert hypervolume(np.array([[1.0]]), np.array([3.0])) == 2
    assert hypervolume(np.array([[1.0, 2.0], [2.0, 1.0]]), np.array([3.0, 3.0])) == pytest.approx(3)
    assert hypervolume(np.array([[0.0, 0.0, 0.0]]), np.array([2.0, 3.0, 4.0])) == pytest.approx(24)
    assert hypervolume(np.array([[0.0, 5.0], [4.0, 0.0]]), np.array([4.0, 5.0])) == 0
    assert hypervolume(np.empty((0, 2)), np.array([1.0, 1.0])) == 0


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_hypervolume_is_that_of_inclusion_and_exclusion(objectives: int, rng: np.random.Generator) -> None:
    for _ in range(10):
        costs, reference = rng.uniform(0, 1, (7, objectives)), np.full(objectives, 0.9)
        expected = 0.0
        for size in range(1, len(costs) + 1):
            for chosen in itertools.combinations(costs, size):
                sides = np.clip(reference - np.max(chosen, axis=0), 0, None)
                expected += (-1) ** (size + 1) * sides.prod()
        assert hypervolume(costs, reference) == pytest.approx(expected, abs=1e-9)


def test_hypervolume_of_a_front_knows_directions(front: ParetoFront) -> None:
    samples = np.random.default_rng(1).uniform((0.5, 0.0), (1.0, 10.0), (200_000, 2))
    inside = np.zeros(len(samples), dtype=bool)
    for p in POINTS:
        inside |= (samples[:, 0] <= p["accuracy"]) & (samples[:, 1] >= p["latency_ms@cpu"])
    expected = inside.mean() * 0.5 * 10
    assert front.hypervolume({"accuracy": 0.5, "latency_ms@cpu": 10.0}) == pytest.approx(expected, rel=0.02)
    with pytest.raises(UnknownFigure, match="lacks latency_ms@cpu"):
        front.hypervolume({"accuracy": 0.5})


# queries -------------------------------------------------------------------------------------------------


def test_points_are_sorted_by_the_second_objective_and_the_rest_is_kept(front: ParetoFront) -> None:
    assert [p.id for p in front.points] == ["a", "b", "d", "e"]
    assert [p.id for p in front.others] == ["c"]
    limited = ParetoFront.of(POINTS, OBJECTIVES, limits=[at_most("latency_ms", 3, "cpu")])
    assert [p.id for p in limited.points] == ["a", "b"]
    noisy = ParetoFront.of(POINTS, OBJECTIVES, noise={"accuracy": 0.01})
    assert [p.id for p in noisy.points] == ["a", "b", "d"]
    assert [p.id for p in ParetoFront.of(POINTS, OBJECTIVES[:1]).points] == ["e"]


def test_best_under_limits(front: ParetoFront) -> None:
    assert front.best("accuracy").id == "e"
    assert front.best("latency_ms@cpu").id == "a"
    assert front.best("macs").id == "e"
    assert front.best("accuracy", {"latency_ms@cpu": 4.0}).id == "d"
    assert front.best("latency_ms@cpu", {"accuracy": 0.75}).id == "b"
    assert front.best("latency_ms@cpu", [at_least("accuracy", 0.85)]).id == "d"
    with pytest.raises(Infeasible, match=r"(?s)what binds is latency_ms@cpu<=0\.5.*nearest reachable point is a: .*=1"):
        front.best("accuracy", {"latency_ms@cpu": 0.5})
    for wrong in ("sram_bytes@cpu", "latency_ms@gpu"):
        with pytest.raises(UnknownFigure, match=f"the front has no {wrong}; it has accuracy, latency_ms@cpu, macs"):
            front.best(wrong)
    with pytest.raises(UnknownFigure, match="did you mean 'accuracy'"):
        front.best("acuracy")


def test_equals_in_one_objective_are_told_apart_by_the_others() -> None:
    front = ParetoFront((maximize("macs"), *OBJECTIVES), (point("a", 0.7, 2.0), point("b", 0.8, 1.0)))
    assert front.best("macs").id == "b"


def test_filter_keeps_what_meets_all_limits(front: ParetoFront) -> None:
    kept = front.filter([at_most("latency_ms", 4, "cpu"), at_least("accuracy", 0.75)])
    assert [p.id for p in kept.points] == ["b", "d"]
    assert {p.id for p in kept.others} == {"a", "c", "e"}
    assert kept.limits == (at_most("latency_ms", 4, "cpu"), at_least("accuracy", 0.75))
    assert not front.filter([at_most("latency_ms", 0.1, "cpu")]).points
    with pytest.raises(UnknownFigure, match="the front has no sram_bytes@cpu"):
        front.filter([at_most("sram_bytes", 4, "cpu")])


def test_what_left_the_front_is_filtered_too(front: ParetoFront) -> None:
    others = (point("near", 0.8, 2.5), point("slow", 0.8, 9.0), POINTS[2])
    kept = replace(front, others=others, left=("near", "slow")).filter([at_most("latency_ms", 4, "cpu")])
    assert kept.left == ("near",) and [p.id for p in kept.departed] == ["near"]


def test_the_knee_is_farthest_from_the_line_through_the_extremes(front: ParetoFront) -> None:
    def distance(p: Evaluation) -> float:
        (x0, y0), (x1, y1) = (0.0, 1.0), (1.0, 0.0)  # e: slowest and best; a: fastest and worst
        x, y = (0.905 - p["accuracy"]) / 0.205, (p["latency_ms@cpu"] - 1) / 8
        return abs((x1 - x0) * (y0 - y) - (x0 - x) * (y1 - y0)) / np.hypot(x1 - x0, y1 - y0)

    assert front.knee() == max(front.points, key=distance)
    assert front.knee().id == "d"
    with pytest.raises(Infeasible, match="no point"):
        ParetoFront(OBJECTIVES, ()).knee()


def test_points_are_found_by_the_start_of_their_id() -> None:
    front = ParetoFront(OBJECTIVES, (point("abc", 0.7, 1), point("abd", 0.8, 2)))
    assert front.find("abd").id == "abd"
    for wrong in ("ab", "x", ""):
        with pytest.raises(UnknownFigure, match="expected one"):
            front.find(wrong)


def test_the_message_names_what_binds_and_prefers_points_that_are_known() -> None:
    limits = [at_least("accuracy", 0.95), at_most("latency_ms", 5, "cpu")]
    unknown = replace(point("x", 0.99, 5.1), figures={"latency_ms@cpu": Figure.exact(5.1)})
    message = nearest_message([point("far", 0.90, 90), point("near", 0.94, 4.5), unknown], limits)
    assert "what binds is accuracy>=0.95.\nThe nearest reachable point is near: accuracy=0.94" in message
    assert "latency_ms@cpu=4.5" in message
    assert nearest_message([unknown], limits).endswith("nearest reachable point is x: latency_ms@cpu=5.1")
    assert "no point" in nearest_message([], limits)


def test_a_front_is_shown_by_its_counts_and_ranges(front: ParetoFront) -> None:
    assert repr(front) == "<ParetoFront: 4 points, accuracy 0.7 to 0.905, latency_ms@cpu 1 to 9, 1 others>"
    assert repr(ParetoFront(OBJECTIVES, ())) == "<ParetoFront: 0 points, 0 others>"


# files ---------------------------------------------------------------------------------------------------


def test_a_front_reads_back_equal(front: ParetoFront, tmp_path: Path) -> None:
    limits = (at_most("macs", 1_048_577), Limit("latency_ms", "<=", 2 / 3, "cpu", 0.95), at_least("accuracy", 0.5))
    believed = replace(POINTS[0], predicted={"latency_ms@cpu": Figure(1.1, 1.0, 1.2, "predicted")})
    for made in (front, replace(front, points=(believed,), limits=limits[:1], noise={"latency_ms@cpu": 0.013})):
        made.save(tmp_path / "front.json")
        assert ParetoFront.load(tmp_path / "front.json") == made
    replace(front, limits=limits).save(tmp_path / "front.json")
    again = ParetoFront.load(tmp_path / "front.json").limits
    assert again[0] == limits[0] and again[1].confidence == 0.95
    assert again[1].value == pytest.approx(2 / 3, rel=1e-14)


def test_the_file_has_the_documented_form(front: ParetoFront, tmp_path: Path) -> None:
    front.save(tmp_path / "front.json")
    content = json.loads((tmp_path / "front.json").read_text())
    assert content["schema"] == 1 and content["space"] == "toy" and content["supernet_sha256"] == "abc"
    assert content["objectives"] == [
        {"name": "accuracy", "direction": "maximize", "unit": "fraction", "device": None},
        {"name": "latency_ms", "direction": "minimize", "unit": "ms", "device": "cpu"},
    ]
    first = content["points"][0]
    assert first["id"] == "a" and first["architecture"] == "width=a" and first["precisions"] == {"stem": "int8"}
    assert first["values"]["latency_ms@cpu"] == {"value": 1.0, "low": None, "high": None, "origin": "predicted"}
    assert content == to_dict(front)


@pytest.mark.parametrize(
    "broken",
    ['{"schema": 2}', '{"schema": 1}', "[]", "no json", '{"schema": 1, "objectives": [{"name": "x"}], "limits": []}'],
)
def test_a_file_that_is_no_front_is_refused_by_name(broken: str, tmp_path: Path) -> None:
    (tmp_path / "front.json").write_text(broken)
    with pytest.raises(ValueError, match=r"front\.json"):
        ParetoFront.load(tmp_path / "front.json")


def test_a_frame_has_a_row_a_point_and_survives_csv(front: ParetoFront) -> None:
    frame = front.to_frame()
    assert list(frame["id"]) == ["a", "b", "d", "e"]
    assert list(frame["accuracy"]) == [0.70, 0.80, 0.90, 0.905]
    assert set(frame["latency_ms@cpu origin"]) == {"predicted"}
    again = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    pd.testing.assert_frame_equal(again, frame, check_dtype=False)
