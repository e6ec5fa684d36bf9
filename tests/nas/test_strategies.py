"""The fixed set of nested sub-models, and draws that depend on the step alone."""

from __future__ import annotations

import numpy as np
import pytest

from nas.strategies import LARGEST_SET, STRATEGIES, Sorted, nested_set
from search_spaces import FAMILIES, MobileNet, SearchSpace, build_space


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return build_space(request.param, {"precisions": ["int8", "fp32"]})


@pytest.mark.parametrize("size", [2, 40, LARGEST_SET])
def test_set_is_distinct_and_holds_the_extremes(space: SearchSpace, size: int, rng: np.random.Generator) -> None:
    found = nested_set(space, size, rng)
    assert len(found) == len(set(found)) == size
    assert {space.largest, space.smallest} <= set(found)


def test_set_ignores_precisions(space: SearchSpace, rng: np.random.Generator) -> None:
    for architecture in nested_set(space, LARGEST_SET, rng):
        assert set(space.lower(architecture).precisions.values()) == {"int8"}  # the first option


def test_chains_are_nested_and_shrink_one_role_at_a_time(space: SearchSpace, rng: np.random.Generator) -> None:
    found = nested_set(space, LARGEST_SET, rng)
    for role in {choice.role for choice in space.choices} - {"precision"}:
        of_role = [i for i, choice in enumerate(space.choices) if choice.role == role and len(choice.options) > 1]
        if not of_role:
            continue
        shrunk = list(space.largest.codes)
        for i in of_role:
            shrunk[i] = 0
        assert space.from_codes(shrunk) in found, role
    widest = max(len(choice.options) for choice in space.choices)
    together = [a for a in found if all(a.codes[i] <= space.largest.codes[i] for i in range(len(a.codes)))]
    assert len(together) >= widest


def test_small_space_gives_all_it_has(rng: np.random.Generator) -> None:
    space = MobileNet(
        resolutions=(8,), widths=(8,), depths=(1,), kernels=(3, 5), expansions=(1, 2), width_multipliers=(1,),
        squeeze_excite=(False,), precisions=("fp32",),
    )  # fmt: skip
    assert len(nested_set(space, 100, rng)) == space.size == 4


def test_draws_depend_on_seed_and_step_alone(space: SearchSpace) -> None:
    for strategy in STRATEGIES.values():
        first, again, other = strategy(space, 3, 30), strategy(space, 3, 30), strategy(space, 4, 30)
        forwards = [first.architectures(step, 2) for step in range(20)]
        backwards = [again.architectures(step, 2) for step in reversed(range(20))]
        assert forwards == backwards[::-1]
        assert forwards != [other.architectures(step, 2) for step in range(20)]
        assert all(len(drawn) == 2 for drawn in forwards)


def test_draws_are_uniform_over_the_set(space: SearchSpace) -> None:
    strategy = Sorted(space, 0, 10)
    drawn = [a for step in range(500) for a in strategy.architectures(step, 4)]
    counts = [drawn.count(a) for a in strategy.set]
    assert sum(counts) == 2000 and min(counts) > 140 and max(counts) < 260  # 200 +- 4.5 deviations


@pytest.mark.parametrize("size", [1, LARGEST_SET + 1])
def test_size_out_of_range(space: SearchSpace, size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} architectures; expected 2 to {LARGEST_SET}"):
        Sorted(space, 0, size)
