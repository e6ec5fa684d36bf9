"""What holds for every training strategy in every space, and for what it trains."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nas.strategies import STRATEGIES, Step, Strategy
from nas.supernet import Supernet
from nas.train import train
from nas.train_settings import TrainSettings
from search_spaces import Architecture, SearchSpace
from tests.nas.training import QUICK, SPACES, Killed, assert_equal, assert_same_runs, corners, kill_at, timeless

EVENTS = {"delayed": {"sort_channels"}, "progressive": {"freeze_teacher", "sort_channels"}}  # of trainings long enough
DATA = corners()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads may come in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(SPACES))
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


@pytest.fixture(params=sorted(STRATEGIES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def made(name: str, space: SearchSpace, steps: int, seed: int = 3, **options: Any) -> Strategy:
    return STRATEGIES[name](space, seed, steps, TrainSettings(strategy=name, **options))


def check_plan(plan: list[Step], space: SearchSpace, micro_batches: int) -> None:
    kept = False
    for step in plan:
        kept = kept or "freeze_teacher" in step.events
        assert step.passes and 0 <= step.learning_rate <= 1
        assert set(step.watched) <= {"smallest", "middle", "largest"} and "largest" in step.watched
        seen = set()  # micro-batches that the largest network went over
        for one in step.passes:
            assert 0 <= one.micro_batch < micro_batches
            assert math.isfinite(one.weight) and one.weight >= 0 and one.labels >= 0
            assert one.labels or one.teacher
            assert 1 <= len(one.candidates) == len(set(one.candidates))
            for candidate in one.candidates:
                check_candidate(candidate, space)
            assert one.teacher in ("", "largest", "frozen")
            assert one.teacher != "largest" or one.micro_batch in seen
            assert one.teacher != "frozen" or kept
            if one.candidates == (space.largest,):
                seen.add(one.micro_batch)
        assert {one.micro_batch for one in step.passes} == set(range(micro_batches))


def check_candidate(candidate: Architecture, space: SearchSpace) -> None:
    assert space.from_codes(candidate.codes) == candidate
    precisions = [c for choice, c in zip(space.choices, candidate.codes, strict=True) if choice.role == "precision"]
    assert not any(precisions)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 150])
def test_plans_are_valid_at_any_length(name: str, space: SearchSpace, steps: int, micro_batches: int) -> None:
    strategy = made(name, space, steps, micro_batches=micro_batches, attend="worst")
    plan = [strategy.step(number) for number in range(steps)]
    check_plan(plan, space, micro_batches)
    events = [event for step in plan for event in step.events]
    assert len(events) == len(set(events)) and set(events) <= EVENTS.get(name, set())
    if steps >= 3:
        assert set(events) == EVENTS.get(name, set())


def test_a_plan_depends_on_seed_and_step_alone(name: str, space: SearchSpace) -> None:
    steps = 30
    first, again, other = (made(name, space, steps, seed) for seed in (3, 3, 4))
    plan = [first.step(number) for number in range(steps)]
    assert [again.step(number) for number in reversed(range(steps))] == plan[::-1]
    assert [first.step(number) for number in range(steps)] == plan
    assert [other.step(number) for number in range(steps)] != plan
    assert len({step.passes for step in plan}) > 1  # it does not train the same again and again


def test_every_network_is_trained_by_the_end(name: str) -> None:
    """The last third of a training reaches all networks of a space that small."""
    space = SPACES["coupled"]
    steps = 900
    strategy = made(name, space, steps)
    trained = {candidate for n in range(600, steps) for one in strategy.step(n).passes for candidate in one.candidates}
    assert trained == set(space.all())


@pytest.mark.parametrize("kind", ["elastic", "transformer"])
def test_training_learns(name: str, kind: str) -> None:
    steps = 70 if name in ("sorted", "uniform") else 25  # of one network each, or of four
    settings = replace(QUICK, strategy=name, steps=steps, learning_rate=0.2, average=0.5, evaluate_every=100)
    if kind == "transformer":
        settings = replace(settings, optimizer="adamw", learning_rate=0.02)
    results = train(Supernet(SPACES[kind]), DATA, settings=settings)
    assert results["largest"] > 0.45  # one in four by chance, 40 images
    assert all(math.isfinite(value) for value in results.values()) and results["rollbacks"] == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_trainings_of_a_few_steps(name: str, steps: int) -> None:
    results = train(Supernet(SPACES["coupled"]), DATA, settings=replace(QUICK, strategy=name, steps=steps))
    assert results["macs"] > 0


# going on ------------------------------------------------------------------------------------------------

SETTINGS = {
    "plain": QUICK,
    "everything": replace(
        QUICK, optimizer="adamw", learning_rate=0.01, micro_batches=2, batch_size=12, average=0.9, gradient_noise=0.01,
        drop_path=0.4, bias_loss=True, mixup=0.4, erasing=0.3, flip=True, crop_padding=1, kernel_transforms=True,
        class_weights={"0": 2.0}, checkpoint_segments=2,
    ),
}  # fmt: skip
WHOLE: dict[tuple[str, str], tuple[Supernet, dict[str, float]]] = {}


def trained(kind: str, name: str, folder: Path) -> tuple[Supernet, dict[str, float]]:
    settings = replace(SETTINGS[kind], strategy=name)
    supernet = Supernet(SPACES["elastic"], seed=5, kernel_transforms=settings.kernel_transforms)
    return supernet, timeless(train(supernet, DATA, seed=1, folder=folder, settings=settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole")


def events_of(name: str) -> list[int]:
    steps = QUICK.steps or 0
    strategy = STRATEGIES[name](SPACES["elastic"], 1, steps, replace(QUICK, strategy=name))
    return [number for number in range(steps) if strategy.step(number).events]


# a step of an event is done again, or was the last, or the last but one; and mixed up with everything, the last
KILLS = [("everything", name, e + 1) for name in STRATEGIES for e in events_of(name)]
KILLS += [("everything", name, 4) for name in STRATEGIES if not events_of(name)]
PLAIN = [("plain", name, e + after) for name in STRATEGIES for e in events_of(name) for after in (0, 1, 2)]
PLAIN += [("plain", name, 4) for name in STRATEGIES if not events_of(name)]


def test_strategies_have_their_events_in_the_trainings_that_are_killed() -> None:
    assert {name for name in STRATEGIES if events_of(name)} == set(EVENTS)
    assert all(0 < step < 12 for *_, step in KILLS + PLAIN)


@pytest.mark.parametrize(
    ("kind", "name", "step"), [*KILLS, *(pytest.param(*kill, marks=pytest.mark.slow) for kill in PLAIN)]
)
def test_a_killed_training_goes_on_bit_for_bit(
    kind: str, name: str, step: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "everything":
        pytest.importorskip("kornia", reason="mixup and erasing need kornia")
    whole = folder / f"{kind}-{name}"
    if (kind, name) not in WHOLE:
        WHOLE[kind, name] = trained(kind, name, whole)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, step)
        trained(kind, name, tmp_path)
    supernet, results = trained(kind, name, tmp_path)
    assert_equal(supernet, WHOLE[kind, name][0])
    assert results == WHOLE[kind, name][1]
    assert_same_runs([whole, tmp_path])
