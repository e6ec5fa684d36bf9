"""What each method trains in each step, against what its authors' descriptions say, written out by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from nas.strategies import (
    LARGEST_SET,
    STRATEGIES,
    Attentive,
    Pass,
    Progressive,
    Sorted,
    Strategy,
    cosine,
    middle,
    nested_set,
)
from nas.train_settings import TrainSettings
from search_spaces import FAMILIES, Architecture, CompactTransformer, MobileNet, SearchSpace, build_space
from tests.nas.training import MOBILENET, SPACES

WIDE = MobileNet(  # three options and more of everything that once-for-all makes elastic
    **MOBILENET
    | {"resolutions": (8, 10, 12), "kernels": (3, 5, 7), "width_multipliers": (0.5, 0.75, 1), "widths": (16,)}
    | {"squeeze_excite": (False, True), "precisions": ("int8", "fp32")}
)


def made(name: str, space: SearchSpace, steps: int, seed: int = 3, **options: Any) -> Strategy:
    return STRATEGIES[name](space, seed, steps, TrainSettings(strategy=name, **options))


def single(one: Pass) -> Architecture:
    (architecture,) = one.candidates
    return architecture


def rate(step: int, steps: int, warm: int) -> float:
    """A line up to the peak, then half a cosine."""
    return (step + 1) / warm if step < warm else (1 + math.cos(math.pi * (step - warm) / (steps - warm))) / 2


def is_uniform(values: list[object], options: int) -> bool:
    counts = list(Counter(values).values())
    return bool(chisquare(counts + [0] * (options - len(counts))).pvalue > 1e-3)


# learning rate -------------------------------------------------------------------------------------------


def test_learning_rate_rises_then_follows_a_cosine() -> None:
    rates = [cosine(step, 100, 0.2) for step in range(100)]
    np.testing.assert_allclose(rates[:20], np.arange(1, 21) / 20)
    np.testing.assert_allclose(rates[20:], 0.5 * (1 + np.cos(np.pi * np.arange(80) / 80)))
    assert max(rates) == 1 and 0 < rates[-1] < 1e-3
    assert cosine(0, 1, 0.2) == cosine(0, 10, 0.0) == 1.0
    assert [cosine(step, 4, 1.0) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("name", ["sorted", "uniform", "sandwich", "attentive", "delayed"])
def test_most_strategies_take_one_cosine_over_all_steps(name: str) -> None:
    strategy = made(name, SPACES["coupled"], 50, warmup=0.2)
    found = [strategy.step(number).learning_rate for number in range(50)]
    np.testing.assert_allclose(found, [rate(number, 50, 10) for number in range(50)])


# sorted --------------------------------------------------------------------------------------------------


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
    space = MobileNet(**MOBILENET | {"depths": (1,), "kernels": (3, 5), "expansions": (1, 2)})
    assert len(nested_set(space, 100, rng)) == space.size == 4


def test_sorted_draws_uniformly_from_its_set() -> None:
    strategy = made("sorted", WIDE, 500, micro_batches=4, architectures=20)
    assert isinstance(strategy, Sorted) and len(strategy.set) == 20
    steps = [strategy.step(number) for number in range(500)]
    assert all([one.micro_batch for one in step.passes] == [0, 1, 2, 3] for step in steps)
    plain = {(one.weight, one.teacher, one.labels, one.regularized) for step in steps for one in step.passes}
    assert plain == {(0.25, "", 1.0, True)} and not any(step.events for step in steps)
    drawn = [single(one) for step in steps for one in step.passes]
    assert set(drawn) == set(strategy.set) and is_uniform([str(a) for a in drawn], 20)
    assert any(len({single(one) for one in step.passes}) > 1 for step in steps)  # each micro-batch its own


# uniform -------------------------------------------------------------------------------------------------


def check_uniform(space: SearchSpace, drawn: list[Architecture]) -> None:
    """Each choice uniform wherever it changes anything."""
    for choice in space.choices:
        if choice.role == "precision":
            assert {a[choice.name] for a in drawn} == {choice.options[0]}
        else:
            active = [a[choice.name] for a in drawn if space.is_active(choice.name, a)]
            assert set(active) == set(choice.options) and is_uniform(list(active), len(choice.options)), choice.name


def test_uniform_draws_every_choice_uniformly() -> None:
    strategy = made("uniform", WIDE, 300, micro_batches=3)
    steps = [strategy.step(number) for number in range(300)]
    assert all([one.micro_batch for one in step.passes] == [0, 1, 2] for step in steps)
    plain = {(one.weight, one.teacher, one.labels, one.regularized) for step in steps for one in step.passes}
    assert plain == {(1 / 3, "", 1.0, True)}
    drawn = [single(one) for step in steps for one in step.passes]
    check_uniform(WIDE, drawn)
    pairs = Counter((a["stage1.depth"], a["resolution"]) for a in drawn)
    assert len(pairs) == 9 and is_uniform([pair for pair, n in pairs.items() for _ in range(n)], 9)  # independent
    assert len(set(drawn)) > 800


# sandwich ------------------------------------------------------------------------------------------------


def test_a_sandwich_is_the_largest_then_the_smallest_and_random_ones() -> None:
    strategy = made("sandwich", WIDE, 200, micro_batches=2, sampled=3)
    drawn = []
    for number in range(200):
        step = strategy.step(number)
        assert step.events == () and set(step.watched) == {"smallest", "middle", "largest"}
        assert len(step.passes) == 10
        for part, layers in enumerate((step.passes[:5], step.passes[5:])):
            largest, smallest, *others = layers
            assert largest == Pass((WIDE.largest,), part, 0.5, teacher="", labels=1.0, regularized=True)
            assert smallest == Pass((WIDE.smallest,), part, 0.5, "largest", labels=0.0, regularized=False)
            for one in others:
                assert one == Pass(one.candidates, part, 0.5, "largest", labels=0.0, regularized=False)
            drawn += [single(one) for one in others]
    check_uniform(WIDE, drawn)
    assert len(made("sandwich", WIDE, 5, sampled=0).step(0).passes) == 2


# attentive -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", ["best", "worst"])
def test_attentive_chooses_among_three_of_about_the_same_macs(attend: str) -> None:
    strategy = made("attentive", WIDE, 400, attend=attend, sampled=2)
    assert isinstance(strategy, Attentive) and len(strategy.groups) == 25
    macs = [[WIDE.lower(a).macs for a in group] for group in strategy.groups]
    assert all(max(lower) <= min(upper) for lower, upper in pairwise(macs))
    assert max(map(len, macs)) - min(map(len, macs)) <= 1 and len({a for g in strategy.groups for a in g}) > 900
    places = []
    for number in range(400):
        largest, smallest, *others = strategy.step(number).passes
        assert largest == Pass((WIDE.largest,))
        assert smallest.candidates == (WIDE.smallest,) and len(others) == 2
        for one in others:
            assert (one.teacher, one.labels, one.weight, one.regularized) == ("largest", 0.0, 1.0, False)
            assert one.highest == (attend == "worst")
            assert len(set(one.candidates)) == 3
            found = {place for place, group in enumerate(strategy.groups) if set(one.candidates) <= set(group)}
            assert len(found) == 1
            places.append(found.pop())
    assert chisquare(np.bincount(places, minlength=25)).pvalue > 1e-3


def test_what_attentive_sampling_draws_from_depends_on_the_seed() -> None:
    first, again, other = (made("attentive", WIDE, 10, seed) for seed in (1, 1, 2))
    assert isinstance(first, Attentive) and isinstance(again, Attentive) and isinstance(other, Attentive)
    assert first.groups == again.groups != other.groups
    check_uniform(WIDE, [architecture for group in first.groups for architecture in group])


def test_attentive_in_a_space_of_two_networks() -> None:
    space = MobileNet(resolutions=(8,), widths=(8,), width_multipliers=(1,), depths=(1, 2), kernels=(3,),
                      expansions=(1,), precisions=("fp32",))  # fmt: skip
    strategy = made("attentive", space, 10)
    candidates = strategy.step(3).passes[2].candidates
    assert len(set(candidates)) == len(candidates) == 2


# delayed -------------------------------------------------------------------------------------------------


def test_delayed_follows_deps() -> None:
    """20 epochs of 15 steps, the first 10 of the full model, in whose last 4 the others ramp up; 2 micro-batches."""
    epochs, batches, full_epochs, ramp_epochs = 20, 15, 10, 4
    steps = epochs * batches
    strategy = made("delayed", WIDE, steps, delay=0.5, ramp=0.2, warmup=0.1, micro_batches=2, sampled=2)

    def eta(step: int) -> float:
        return rate(step, steps, 30)

    for number in range(steps):
        step = strategy.step(number)
        epoch = number // batches
        assert step.learning_rate == pytest.approx(eta(number))
        assert step.events == (("sort_channels",) if number == (full_epochs - ramp_epochs) * batches else ())
        if epoch < full_epochs - ramp_epochs:
            assert step.passes == (Pass((WIDE.largest,), 0, 0.5), Pass((WIDE.largest,), 1, 0.5))
            assert step.watched == ("largest",)
            continue
        beta = 1.0
        if epoch < full_epochs:
            done = number - (full_epochs - ramp_epochs) * batches
            beta = done / (ramp_epochs * batches) * eta(full_epochs * batches) / eta(number)
        assert set(step.watched) == {"smallest", "middle", "largest"}
        for part, (largest, smallest, *others) in enumerate((step.passes[:4], step.passes[4:])):
            assert largest == Pass((WIDE.largest,), part, 0.5)
            assert smallest.candidates == (WIDE.smallest,) and len(others) == 2
            for one in (smallest, *others):
                assert (one.micro_batch, one.teacher, one.labels, one.regularized) == (part, "largest", 0.0, False)
                assert one.weight == pytest.approx(beta / 2, abs=1e-12)


def test_delayed_without_a_ramp_or_a_delay() -> None:
    jump = made("delayed", WIDE, 40, delay=0.25, ramp=0.0)
    counts = [(len(jump.step(n).passes), jump.step(n).passes[-1].weight) for n in range(40)]
    assert counts == [(1, 1.0)] * 10 + [(4, 1.0)] * 30
    assert [n for n in range(40) if jump.step(n).events] == [10]
    at_once = made("delayed", WIDE, 40, delay=0.0, ramp=0.0)
    assert {len(at_once.step(n).passes) for n in range(40)} == {4} and at_once.step(0).events == ("sort_channels",)


# progressive ---------------------------------------------------------------------------------------------

ROLES = {"kernel": {"kernel", "resolution"}, "depth": {"depth"}, "width": {"width", "expand", "operator"}}
# first epoch, last, subnets a step, peak rate against .03, roles of all options, roles of the two largest, events
PHASES: tuple[tuple[int, int, int, float, set[str], set[str], tuple[str, ...]], ...] = (
    (180, 305, 1, 1.0, ROLES["kernel"], set(), ("freeze_teacher",)),
    (305, 330, 2, 0.0025 / 0.03, ROLES["kernel"], ROLES["depth"], ()),
    (330, 455, 2, 0.0075 / 0.03, ROLES["kernel"] | ROLES["depth"], set(), ()),
    (455, 480, 4, 0.0025 / 0.03, ROLES["kernel"] | ROLES["depth"], ROLES["width"], ("sort_channels",)),
    (480, 605, 4, 0.0075 / 0.03, ROLES["kernel"] | ROLES["depth"] | ROLES["width"], set(), ()),
)


def check_options(space: SearchSpace, drawn: list[Architecture], of_all: set[str], of_two: set[str]) -> None:
    for choice in space.choices:
        found = {a[choice.name] for a in drawn if space.is_active(choice.name, a)}
        if choice.role == "precision":
            expected = set(choice.options[:1])
        elif choice.role in of_all:
            expected = set(choice.options)
        else:
            expected = set(choice.options[-2 if choice.role in of_two else -1 :])
        assert found == expected, choice.name


def test_progressive_takes_the_phases_of_once_for_all() -> None:
    strategy = made("progressive", WIDE, 605, micro_batches=2, warmup=0.04)
    for number in range(180):
        step = strategy.step(number)
        assert step.passes == tuple(Pass((WIDE.largest,), part, 0.5) for part in range(2))
        assert step.learning_rate == pytest.approx(rate(number, 180, 7)) and step.events == ()
        assert step.watched == ("largest",)
    for start, end, subnets, peak, of_all, of_two, events in PHASES:
        drawn = []
        for number in range(start, end):
            step = strategy.step(number)
            warm = max(1, round(0.04 * (end - start)))
            assert step.learning_rate == pytest.approx(peak * rate(number - start, end - start, warm), rel=0.01)
            assert step.events == (events if number == start else ()), number
            assert [one.micro_batch for one in step.passes] == [part for part in range(2) for _ in range(subnets)]
            how = {(one.weight, one.teacher, one.labels, one.regularized) for one in step.passes}
            assert how == {(0.5, "frozen", 1.0, False)}
            assert step.watched == (("smallest", "middle", "largest") if start == 480 else ("largest",))
            drawn += [single(one) for one in step.passes]
        check_options(WIDE, drawn, of_all, of_two)
    check_uniform(WIDE, drawn)  # of the last phase


def phases_of(strategy: Strategy, steps: int) -> list[tuple[int, int, tuple[str, ...]]]:
    """(first step, passes, events) whenever the number of passes or the events change."""
    found: list[tuple[int, int, tuple[str, ...]]] = []
    for number in range(steps):
        step = strategy.step(number)
        if not found or len(step.passes) != found[-1][1] or step.events:
            found.append((number, len(step.passes), step.events))
    return found


def test_progressive_leaves_out_what_is_not_elastic() -> None:
    fixed = MobileNet(**MOBILENET | {"depths": (2,), "kernels": (3,), "expansions": (2, 4)})  # two options: no half way
    assert phases_of(made("progressive", fixed, 305), 305) == [
        (0, 1, ()),
        (180, 4, ("freeze_teacher", "sort_channels")),
    ]
    kernels = MobileNet(**MOBILENET | {"depths": (2,), "kernels": (3, 5, 7), "expansions": (4,)})
    strategy = made("progressive", kernels, 305)
    assert phases_of(strategy, 305) == [(0, 1, ()), (180, 4, ("freeze_teacher",))]  # the last phase: four subnets
    alone = kernels.restricted({choice.name: choice.options[-1:] for choice in kernels.choices})
    assert phases_of(made("progressive", alone, 50), 50) == [(0, 1, ())]
    heads = CompactTransformer(
        resolutions=(8,), channels=1, classes=4, embeddings=(8,), depths=(1,), heads=(1, 2, 4), head_size=4,
        mlp_ratios=(1,), tokenizer_pools=(True,), precisions=("fp32",),
    )  # fmt: skip
    strategy = made("progressive", heads, 330)
    assert phases_of(strategy, 330) == [(0, 1, ()), (180, 4, ("freeze_teacher", "sort_channels"))]
    assert {single(one)["block0.heads"] for n in range(180, 205) for one in strategy.step(n).passes} == {2, 4}


def test_progressive_where_width_follows_depth() -> None:
    space = SPACES["coupled"]
    assert {choice.role for choice in space.choices if len(choice.options) > 1} == {"depth"}
    strategy = made("progressive", space, 330)  # 180 epochs, 25 of two depths, 125 of three
    assert phases_of(strategy, 330) == [
        (0, 1, ()),
        (180, 2, ("freeze_teacher", "sort_channels")),
        (205, 4, ()),
    ]
    half = [single(one) for n in range(180, 205) for one in strategy.step(n).passes]
    full = [single(one) for n in range(205, 330) for one in strategy.step(n).passes]
    assert {a["stage1.depth"] for a in half} == {2, 3} and {a["stage1.depth"] for a in full} == {1, 2, 3}
    kernels = MobileNet(**MOBILENET | {"coupled": True, "kernels": (3, 5)})
    found = phases_of(made("progressive", kernels, 455), 455)  # channels shrink with depth, not with kernels
    assert [(number, events) for number, _, events in found if events] == [
        (180, ("freeze_teacher",)),
        (305, ("sort_channels",)),
    ]


@pytest.mark.parametrize("steps", [2, 4, 8, 10, 20, 60])
def test_short_phases_lose_no_event(steps: int) -> None:
    """Phases of 25 epochs in 605 have no step of their own then."""
    strategy = made("progressive", WIDE, steps)
    assert isinstance(strategy, Progressive)
    order = [event for number in range(steps) for event in strategy.step(number).events]
    assert order == ["freeze_teacher", "sort_channels"][: 1 if steps == 2 else 2]


# architectures -------------------------------------------------------------------------------------------


def test_middle_and_undeployed() -> None:
    half = middle(WIDE)
    assert (half["resolution"], half["stage1.depth"], half["stage1.block0.kernel"]) == (10, 2, 5)
    assert half["stage1.block0.squeeze_excite"] is False  # the lower of two
    drawn = WIDE.sample(np.random.default_rng(0))
    plain = WIDE.undeployed(drawn)
    for choice in WIDE.choices:
        assert plain[choice.name] == (choice.options[0] if choice.role == "precision" else drawn[choice.name])


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_sees_no_patches(name: str) -> None:
    space = MobileNet(**MOBILENET | {"patches": (1, 2), "precisions": ("int8",)})
    strategy = made(name, space, 30)
    drawn = {a for number in range(30) for one in strategy.step(number).passes for a in one.candidates}
    drawn |= {middle(space), *nested_set(space, 20, np.random.default_rng(0))}
    assert {architecture["patches"] for architecture in drawn} == {1}
