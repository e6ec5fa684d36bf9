"""Which choices matter, on functions whose shares of the variance are known."""

from __future__ import annotations

import numpy as np
import pytest

from nas.costs import Figure, Objective
from nas.front import Evaluation, ParetoFront
from nas.importance import ABSENT, codes_of_choices, importance


def front(codes: np.ndarray, values: np.ndarray) -> ParetoFront:
    objective = Objective("y", "minimize", foreign=True)
    evaluations = [
        Evaluation(str(i), ",".join(f"{name}={c}" for name, c in zip("abcd", row, strict=True) if c), {"y": f}, {})
        for i, (row, f) in enumerate(zip(codes, map(Figure.exact, values), strict=True))
    ]
    return ParetoFront.of(evaluations, [objective])


def test_shares_are_those_of_the_variance_and_choices_that_do_nothing_stay_in_the_noise(
    rng: np.random.Generator,
) -> None:
    codes = rng.integers(0, 3, (300, 4))
    (found,) = importance(front(codes, 3.0 * codes[:, 0] + 1.0 * codes[:, 1]))
    shares = dict(found.shares)
    assert shares["a"] == pytest.approx(0.9, abs=0.08) and shares["b"] == pytest.approx(0.1, abs=0.04)
    assert found.shares[0][0] == "a" and set(found.matter) >= {"a", "b"} and found.explained > 0.95
    assert max(shares["c"], shares["d"]) < 0.01 and found.noise < 0.01


def test_choices_that_only_matter_together_are_found(rng: np.random.Generator) -> None:
    codes = rng.integers(0, 2, (400, 4))
    (found,) = importance(front(codes, (codes[:, 0] ^ codes[:, 1]).astype(float)))
    assert {name for name, _ in found.shares[:2]} == {"a", "b"} and found.shares[1][1] > 0.5


def test_too_few_evaluations_and_pure_chance_say_so(rng: np.random.Generator) -> None:
    few = importance(front(rng.integers(0, 3, (12, 4)), rng.uniform(size=12)))[0]
    assert "12 evaluations, 30 needed" in few.doubt and few.matter == ()
    chance = importance(front(rng.integers(0, 3, (60, 4)), rng.uniform(size=60)))[0]
    assert "too few" in chance.doubt and chance.matter == ()
    level = importance(front(rng.integers(0, 3, (40, 4)), np.ones(40)))[0]
    assert "equal" in level.doubt
    with pytest.raises(ValueError, match="no choice differs"):
        importance(front(np.zeros((40, 4), dtype=int), rng.uniform(size=40)))


def test_choices_are_read_from_the_texts_of_architectures() -> None:
    texts = ["width=16,kernel=5", "width=8", "width=24,kernel=3,op=x", "plain"]
    names, options, codes = codes_of_choices([Evaluation("", text, {}, {}) for text in texts])
    assert names == ("width", "kernel", "op")
    assert options == [[ABSENT, "8", "16", "24"], [ABSENT, "3", "5"], [ABSENT, "x"]]
    assert codes.tolist() == [[2, 2, 0], [1, 0, 0], [3, 1, 1], [0, 0, 0]]
