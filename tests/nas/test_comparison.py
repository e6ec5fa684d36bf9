"""Two fronts compared, against numbers worked out by hand and a brute-force attainment."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nas.comparison import Stretch, attained, epsilon
from nas.costs import Figure, Objective, UnknownFigure
from nas.front import Evaluation, ParetoFront

OBJECTIVES = (Objective("acc", "maximize", foreign=True), Objective("ms", "minimize", foreign=True))


def front(*values: tuple[float, float], noise: dict[str, float] | None = None) -> ParetoFront:
    points = [
        Evaluation(f"{i}", "", {"acc": Figure.exact(acc), "ms": Figure.exact(ms)}, {})
        for i, (acc, ms) in enumerate(values)
    ]
    return ParetoFront.of(points, OBJECTIVES, noise=noise)


def test_numbers_of_two_small_fronts() -> None:
    a, b = front((0.0, 1.0), (10.0, 3.0)), front((5.0, 2.0), (8.0, 3.0), (10.0, 5.0))
    found = a.against(b, {"acc": -5.0, "ms": 6.0})
    # the box, acc -5..10 and ms 1..6, has an area of 75: A covers 2*5 + 3*15, B 1*10 + 2*13 + 1*15, both 60
    assert found.hypervolume == pytest.approx((55 / 75, 51 / 75))
    assert found.adds == pytest.approx((9 / 75, 5 / 75))
    assert found.beaten == (0, 2)
    # A's (10, 3) reaches B's (5, 2) with a quarter of the span of ms, and so does B's (5, 2) A's (0, 1)
    assert found.epsilon == pytest.approx((0.25, 0.25))
    assert found.stretches == (
        Stretch(1.0, 2.0, "first", None, None),
        Stretch(2.0, 3.0, "second", 5.0, 5.0),
        Stretch(3.0, 5.0, "first", 2.0, 2.0),
        Stretch(5.0, None, "neither", 0.0, 0.0),
    )
    back = b.against(a, {"acc": -5.0, "ms": 6.0})
    assert back.hypervolume == found.hypervolume[::-1] and back.beaten == (2, 0)
    assert back.epsilon == found.epsilon[::-1]
    assert [s.leader for s in back.stretches] == ["second", "first", "second", "neither"]


def test_the_reference_is_a_tenth_of_the_span_beyond_the_worst() -> None:
    found = front((0.0, 1.0)).against(front((10.0, 3.0)))
    assert found.reference == pytest.approx({"acc": -1.0, "ms": 3.2})
    same = front((5.0, 2.0)).against(front((5.0, 2.0)))
    assert same.reference == pytest.approx({"acc": 4.5, "ms": 2.2})
    assert same.hypervolume == (1, 1) and same.adds == (0, 0) and same.epsilon == (0, 0)


def test_leads_within_the_noise_are_none() -> None:
    a, b = front((10.0, 1.0), noise={"ms": 0.05}), front((10.0, 1.02))
    assert a.against(b).beaten == (0, 0) and a.against(b).noise == {"ms": 0.05}
    assert all(s.leader == "neither" for s in a.against(b).stretches)
    assert replace(a, noise=None).against(b).beaten == (0, 1)
    c = front((10.2, 1.0), noise={"acc": 0.05})
    assert c.against(b).stretches[-1].leader == "neither"


def test_epsilon_and_attainment_are_those_of_loops(rng: np.random.Generator) -> None:
    for _ in range(20):
        a, b = rng.uniform(size=(6, 3)), rng.uniform(size=(5, 3))
        by_hand = max(min(max(x[i] - y[i] for i in range(3)) for x in a) for y in b)
        assert epsilon(a, b) == pytest.approx(by_hand)
        assert (b >= (a - by_hand - 1e-12)[:, None]).all(axis=2).any(axis=0).all()
        budgets = rng.uniform(size=7)
        expected = [min((x[0] for x in a if x[1] <= budget), default=np.inf) for budget in budgets]
        assert attained(a[:, :2], budgets).tolist() == expected


def test_fronts_that_cannot_be_compared_are_refused() -> None:
    a = front((1.0, 1.0))
    other = replace(a, objectives=(OBJECTIVES[0], Objective("macs", "minimize")))
    with pytest.raises(ValueError, match=r"different objectives.*minimize ms.*minimize macs"):
        a.against(other)
    with pytest.raises(ValueError, match="without a point"):
        a.against(front())
    with pytest.raises(UnknownFigure, match="names size; the objectives are acc, ms"):
        a.against(a, {"size": 1})
    with pytest.raises(ValueError, match=r"ms=0\.5 leaves nothing to dominate"):
        a.against(a, {"ms": 0.5})


def test_the_order_of_objectives_does_not_matter() -> None:
    a, b = front((0.0, 1.0), (10.0, 3.0)), front((5.0, 2.0))
    assert a.against(replace(b, objectives=OBJECTIVES[::-1])).hypervolume == a.against(b).hypervolume
