"""The search: what it evaluates, in which order, under which limits, and how it goes on."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState

import nas
from hardware_profiles import load_device
from nas.candidates import devices_of
from nas.costs import Infeasible, ProfiledDevice, UnknownFigure, at_least, at_most, maximize, minimize
from nas.evaluator import Evaluator, Score
from nas.guided_sampler import UNMEASURED
from nas.search import _holds, study_name
from nas.study import storage_url
from nas.supernet import Supernet
from search_spaces import Architecture, MobileNet, SearchSpace
from tests.nas import tiny


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def toy(tmp_path: Path) -> ProfiledDevice:
    return ProfiledDevice(tiny.device(tmp_path))


def run(
    evaluator: tiny.FakeEvaluator, objectives: list[Any], limits: list[Any] | None = None, **options: Any
) -> nas.ParetoFront:
    settings = {"trials": 40, "population": 8} | options
    net: Any = _Net(evaluator.space)
    return nas.search(net, None, objectives, limits or [], evaluator=evaluator, **settings)  # type: ignore[arg-type]


class _Net:
    """Stands for a supernet where only its space is asked for."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space


def enumerate_space(space: SearchSpace) -> set[Architecture]:
    """Every architecture, by breadth-first search from the smallest."""
    found, queue = {space.smallest}, [space.smallest]
    while queue:
        for relative in space.neighbours(queue.pop()):
            if relative not in found:
                found.add(relative)
                queue.append(relative)
    return found


SMALL = {"depths": (1,), "expansions": (1,), "strides": (1,), "widths": (8,)}


def test_energy_is_searched_for_and_limited_like_latency(tmp_path: Path) -> None:
    energy = {"origin": "fitted", "source": "made up", "power_mw": 40.0, "relative_error": 0.2, "held_out": {}}
    device = ProfiledDevice(tiny.device(tmp_path, energy=energy))
    objectives = [maximize("accuracy"), minimize("energy_uj", device)]
    front = run(tiny.FakeEvaluator(tiny.space()), objectives)
    spent = sorted(point["energy_uj@toy"] for point in front.points)
    assert len(spent) > 2 and all(point.figures["energy_uj@toy"].origin == "predicted" for point in front.points)
    most = (spent[0] + spent[-1]) / 2
    limited = run(tiny.FakeEvaluator(tiny.space()), objectives, [at_most("energy_uj", most, device, confidence=0.95)])
    assert limited.points and all(1.2 * point["energy_uj@toy"] <= most for point in limited.points)
    with pytest.raises(UnknownFigure, match="no energy of toy was measured"):
        run(tiny.FakeEvaluator(tiny.space()), [minimize("energy_uj", ProfiledDevice(tiny.device(tmp_path)))])


# what is evaluated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["guided", "nsga2", "tpe", "random"])
@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_nothing_is_evaluated_twice_and_the_extremes_always_are(
    sampler: str, objectives: int, toy: ProfiledDevice
) -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    wanted = [maximize("accuracy"), minimize("latency_ms", toy), minimize("model_bytes")][:objectives]
    front = run(evaluator, wanted, sampler=sampler)
    asked = [architecture for architecture, _ in evaluator.asked]
    assert len(asked) == len(set(asked)) == 40
    assert {split for _, split in evaluator.asked} == {"val_search"}
    ends = (evaluator.space.smallest, evaluator.space.largest)
    assert {evaluator.space.with_precision(end, p) for end in ends for p in ("fp32", "int8")} <= set(asked)
    by_text = {str(a): a for a in asked}
    for point in (*front.points, *front.others):
        assert point["accuracy"] == tiny.formula(by_text[point.architecture], "val_search")
        assert point["macs"] == evaluator.space.lower(by_text[point.architecture]).macs
    assert len(front.points) + len(front.others) == 40


@pytest.mark.parametrize("sampler", ["guided", "nsga2", "tpe", "random"])
def test_a_small_space_is_used_up_exactly(sampler: str) -> None:
    space = tiny.space(**SMALL)
    everything = enumerate_space(space)
    assert len(everything) == space.size < 200
    evaluator = tiny.FakeEvaluator(space)
    front = run(evaluator, [maximize("accuracy"), minimize("macs")], sampler=sampler, trials=10_000)
    asked = [architecture for architecture, _ in evaluator.asked]
    assert len(asked) == len(everything) and set(asked) == everything
    best = max(tiny.formula(a, "val_search") for a in everything)
    assert max(point["accuracy"] for point in front.points) == best


def test_with_two_trials_it_is_the_smallest_and_the_largest() -> None:
    evaluator = tiny.FakeEvaluator(tiny.space(precisions=("fp32",)))
    run(evaluator, [maximize("accuracy"), minimize("macs")], trials=2)
    assert [a for a, _ in evaluator.asked] == [evaluator.space.smallest, evaluator.space.largest]


def test_a_front_is_that_of_all_that_was_evaluated() -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    front = run(evaluator, [maximize("accuracy"), minimize("macs")], trials=60)
    values = {str(a): (tiny.formula(a, "val_search"), evaluator.space.lower(a).macs) for a, _ in evaluator.asked}
    best = {
        text
        for text, (accuracy, macs) in values.items()
        if not any(x >= accuracy and y <= macs and (x, y) != (accuracy, macs) for x, y in values.values())
    }
    assert {point.architecture for point in front.points} <= best
    assert {values[point.architecture] for point in front.points} == {values[text] for text in best}


def test_accuracies_have_the_interval_of_their_images() -> None:
    front = run(tiny.FakeEvaluator(tiny.space()), [maximize("accuracy"), minimize("macs")], trials=4)
    figure = front.points[0].figures["accuracy"]
    assert figure.origin == "measured" and figure.low < figure.value < figure.high  # type: ignore[operator]


# limits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["guided", "nsga2"])
def test_what_breaks_a_limit_is_not_run_and_not_on_the_front(sampler: str, toy: ProfiledDevice) -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    space = evaluator.space
    bound = float(np.median([space.lower(space.sample(np.random.default_rng(i))).macs for i in range(40)]))
    latencies = sorted(
        toy.figure(space.lower(space.sample(np.random.default_rng(i))), "latency_ms").value for i in range(40)
    )
    limits = [at_most("macs", bound), at_most("latency_ms", latencies[20], toy, confidence=0.95)]
    front = run(evaluator, [maximize("accuracy"), minimize("latency_ms", toy)], limits, trials=60, sampler=sampler)
    asked = [a for a, _ in evaluator.asked]
    assert len(asked) == 60 if sampler == "guided" else 0 < len(asked) < 60  # guided ones are all within the limits
    for architecture in asked:
        network = space.lower(architecture)
        assert network.macs <= bound
        assert 1.1 * toy.figure(network, "latency_ms").value <= latencies[20]
    assert {p.architecture for p in (*front.points, *front.others)} == {str(a) for a in asked}


def test_a_limit_on_accuracy_is_judged_once_it_is_known() -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    front = run(evaluator, [minimize("macs"), maximize("accuracy")], [at_least("accuracy", 0.6)])
    assert len(evaluator.asked) == 40
    assert all(point["accuracy"] >= 0.6 for point in (*front.points, *front.others))
    with pytest.raises(Infeasible, match=r"(?s)what binds is accuracy>=0\.99.*The nearest reachable point is"):
        run(evaluator, [minimize("macs")], [at_least("accuracy", 0.99)])


def test_limits_out_of_reach_are_told_before_anything_runs(toy: ProfiledDevice) -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    smallest = min(evaluator.space.lower(a).macs for a in (evaluator.space.smallest,))
    with pytest.raises(Infeasible) as caught:
        run(evaluator, [maximize("accuracy")], [at_most("macs", 10), at_most("params", 1e9)])
    assert "what binds is macs<=10 (macs is reachable from" in str(caught.value)
    assert f"macs={smallest}" in str(caught.value)
    assert not evaluator.asked


def test_limits_that_few_architectures_meet_are_met() -> None:
    space = tiny.space()
    evaluator = tiny.FakeEvaluator(space)
    target = space.lower(space.with_precision(space.largest, "fp32")).macs
    front = run(evaluator, [minimize("model_bytes")], [at_least("macs", target)], trials=8)
    assert all(point["macs"] >= target for point in front.points)


def test_the_memory_of_a_device_is_a_limit_of_its_own(tmp_path: Path) -> None:
    space = tiny.space()
    needed = sorted(space.lower(space.sample(np.random.default_rng(i))).model_bytes for i in range(30))
    limits = {
        "sram_bytes": {"value": 1_000_000, "source": "made up"},
        "flash_bytes": {"value": needed[15], "source": "made up"},
    }
    device = ProfiledDevice(tiny.device(tmp_path, limits=limits))
    evaluator = tiny.FakeEvaluator(space)
    front = run(evaluator, [maximize("accuracy"), minimize("latency_ms", device)])
    assert len(evaluator.asked) == 40
    assert all(space.lower(a).model_bytes <= needed[15] for a, _ in evaluator.asked)
    assert [str(limit) for limit in front.limits] == ["sram_bytes@toy<=1000000", f"flash_bytes@toy<={needed[15]}"]
    assert all(point["flash_bytes@toy"] == point["model_bytes"] for point in front.points)
    free = run(tiny.FakeEvaluator(space), [maximize("accuracy")], devices=[device])  # profiled, but nobody asks
    assert not free.limits
    tight = limits | {"sram_bytes": {"value": 10, "source": "made up"}}
    with pytest.raises(Infeasible, match="what binds is sram_bytes@toy<=10"):
        run(evaluator, [minimize("latency_ms", ProfiledDevice(tiny.device(tmp_path, limits=tight)))])


def test_only_precisions_of_all_devices_are_tried(toy: ProfiledDevice) -> None:
    mcu = load_device("stm32f746")
    evaluator = tiny.FakeEvaluator(tiny.space())
    front = run(evaluator, [maximize("accuracy"), minimize("latency_ms", mcu), minimize("latency_ms", toy)])
    assert len(evaluator.asked) == 40
    assert {p for point in front.points for p in point.precisions.values()} == {"int8"}
    assert front.points[0].figures["latency_ms@stm32f746"].high is None
    phone = load_device("adreno540")  # has no int8
    with pytest.raises(Infeasible, match="no architecture is legal on stm32f746, adreno540: together they run nothing"):
        run(evaluator, [minimize("latency_ms", mcu), minimize("latency_ms", phone)])


def test_patches_are_tried_only_where_all_devices_run_them(toy: ProfiledDevice) -> None:
    mcu = load_device("stm32f746")
    space = tiny.space(patches=(1, 2), precisions=("int8",))
    for devices, tried in (((mcu,), {1, 2}), ((mcu, toy), {1})):
        evaluator = tiny.FakeEvaluator(space)
        run(evaluator, [maximize("accuracy"), *(minimize("latency_ms", device) for device in devices)])
        assert {architecture["patches"] for architecture, _ in evaluator.asked} == tried
    always = tiny.FakeEvaluator(tiny.space(patches=(2,), precisions=("int8",)))
    with pytest.raises(
        Infeasible, match=r"no architecture is legal on toy, which runs no layers patch by patch: .* 2 pat"
    ):
        run(always, [minimize("latency_ms", toy)])


@pytest.mark.parametrize("sampler", ["guided", "nsga2", "tpe", "random"])
def test_what_a_device_cannot_run_is_infinite_and_never_on_the_front(sampler: str, tmp_path: Path) -> None:
    """The device runs fp32 and int8 convolutions, but adds no integers: int8 residuals are out."""
    kinds = {kind: ["fp32", "int8"] for kind in ("conv2d", "linear", "pool", "reshape")} | {"add": ["fp32"]}
    device = ProfiledDevice(tiny.device(tmp_path, precisions={"source": "made up", "value": kinds}))
    evaluator = tiny.FakeEvaluator(tiny.space())
    storage = optuna.storages.InMemoryStorage()
    front = run(evaluator, [maximize("accuracy"), minimize("latency_ms", device)], sampler=sampler, storage=storage)
    for architecture, _ in evaluator.asked:
        assert not device.profile.illegal_layers(evaluator.space.lower(architecture))
    assert all(math.isfinite(point["latency_ms@toy"]) for point in (*front.points, *front.others))
    study = optuna.load_study(study_name=None, storage=storage)
    illegal = [t for t in study.trials if t.state == TrialState.COMPLETE and t.constraints["legal@toy"] > 0]
    assert bool(illegal) == (sampler != "guided") and all(math.isinf(t.values[1]) for t in illegal)


def test_one_search_has_a_front_for_each_device(tmp_path: Path, toy: ProfiledDevice) -> None:
    free = {f"{family}.{p}.macs": 1e-9 for family in ("conv", "linear") for p in ("fp32", "int8")}
    dear = {f"pointwise.{p}.macs": 3e-6 for p in ("fp32", "int8")} | {"depthwise.int8.macs": 9e-6}
    held = dict.fromkeys(yaml.safe_load(tiny.device_yaml())["latency"]["coefficients_ms"], 0.0)
    latency = {"origin": "derived", "source": "made up", "constant_ms": 0.1, "coefficients_ms": held | free | dear}
    other = ProfiledDevice(tiny.device(tmp_path, "other", latency=latency))
    wanted = [maximize("accuracy"), minimize("latency_ms", toy), minimize("latency_ms", other)]
    front = run(tiny.FakeEvaluator(tiny.space()), wanted)
    parts = front.per_device()
    assert list(parts) == ["toy", "other"]
    everything = [*front.points, *front.others]
    for name, part in parts.items():
        key = f"latency_ms@{name}"
        assert [objective.key for objective in part.objectives] == ["accuracy", key]
        values = {(e["accuracy"], e[key]) for e in everything}
        best = {v for v in values if not any(u != v and u[0] >= v[0] and u[1] <= v[1] for u in values)}
        assert {(e["accuracy"], e[key]) for e in part.points} == best
        assert len(part.points) + len(part.others) == len(everything)
    assert {p.id for p in parts["toy"].points} != {p.id for p in parts["other"].points}
    assert nas.front.to_dict(front)["per_device"] == {n: [p.id for p in part.points] for n, part in parts.items()}
    assert front.of_device("toy") == parts["toy"]
    with pytest.raises(UnknownFigure, match="those of devices are of toy, other"):
        front.of_device("third")
    four = [*wanted, minimize("model_bytes")]
    assert run(tiny.FakeEvaluator(tiny.space()), four).points


def test_limits_of_two_devices_that_can_only_be_met_apart_say_so(tmp_path: Path, toy: ProfiledDevice) -> None:
    """What is fast on one has fp32 in the layer that the other is slow in."""
    free = dict.fromkeys(yaml.safe_load(tiny.device_yaml())["latency"]["coefficients_ms"], 0.0)
    coefficients = free | {"conv.int8.count": 1.0, "conv.fp32.count": 0.1}
    latency = {"origin": "derived", "source": "made up", "constant_ms": 0.1, "coefficients_ms": coefficients}
    other = ProfiledDevice(tiny.device(tmp_path, "other", latency=latency))
    space = tiny.space()
    coded = [space.with_precision(space.smallest, p) for p in ("fp32", "int8")]
    ours = sorted(toy.figure(space.lower(a), "latency_ms").value for a in coded)
    limits = [at_most("latency_ms", ours[0] * 1.001, toy), at_most("latency_ms", 0.25, other)]
    for each in limits:
        assert run(tiny.FakeEvaluator(space), [maximize("accuracy")], [each], trials=4).points
    with pytest.raises(Infeasible) as caught:
        run(tiny.FakeEvaluator(space), [maximize("accuracy")], limits)
    assert "together, though each alone can be met (latency_ms@toy is reachable from" in str(caught.value)
    assert "no architecture meets" in str(caught.value)


def test_a_search_tells_what_its_limits_leave(toy: ProfiledDevice, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="nas.search"):
        limits = [at_most("macs", 60_000), at_least("accuracy", 0.1)]
        run(tiny.FakeEvaluator(tiny.space()), [maximize("accuracy")], limits, trials=4)
    assert "macs <= 60,000: reachable from 16,536 to 95,536; " in caplog.text
    assert "of 4,000 random architectures meet it" in caplog.text
    assert "accuracy >= 0.1: judged during the search" in caplog.text


def test_a_space_that_no_device_layer_covers_says_which(tmp_path: Path) -> None:
    space = tiny.space(nonlinearity="hardswish", precisions=("int8",))
    with pytest.raises(Infeasible, match="stm32f746 runs no fp32 activation hardswish"):
        run(tiny.FakeEvaluator(space), [minimize("latency_ms", load_device("stm32f746"))])


# refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_searched_is_refused_first(toy: ProfiledDevice) -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    host = load_device("host-cpu")
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (UnknownFigure, "not profiled yet; use nas.profile", {"objectives": [minimize("latency_ms", host)]}),
        (UnknownFigure, "'cpu' is not profiled", {"objectives": [minimize("latency_ms", "cpu")]}),
        (ValueError, "0 objectives", {"objectives": []}),
        (ValueError, "given twice", {"objectives": [minimize("macs"), minimize("macs")]}),
        (
            ValueError,
            "one of guided, nsga2, nsga3, tpe, gp, random",
            {"objectives": [minimize("macs")], "sampler": "cma"},
        ),
        (ValueError, "cannot open the study storage", {"objectives": [minimize("macs")], "storage": "no such thing"}),
        (ValueError, "cannot open the study storage", {"objectives": [minimize("macs")], "storage": "nosuch://db"}),
        (ValueError, "not both", {"objectives": [minimize("macs")], "settings": nas.SearchSettings()}),
        (TypeError, "trails", {"objectives": [minimize("macs")], "trails": 3}),
    ]
    for kind, said, given in cases:
        with pytest.raises(kind, match=said):
            run(evaluator, **given)
    assert not evaluator.asked


def test_two_devices_of_one_name_are_told_apart(tmp_path: Path, toy: ProfiledDevice) -> None:
    other = ProfiledDevice(tiny.device(tmp_path, threads=2))
    with pytest.raises(ValueError, match="two different devices are called 'toy'"):
        devices_of([minimize("latency_ms", toy), at_most("sram_bytes", 5, other)], [])
    assert devices_of([minimize("latency_ms", toy)], [toy, ProfiledDevice(load_device("stm32f746"))]) == {"toy": toy}


# going on ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a process that dies in the middle of an evaluation."""


class Mortal(tiny.FakeEvaluator):
    def __init__(self, space: SearchSpace, lives: int) -> None:
        super().__init__(space)
        self.lives = lives

    def accuracy(self, architecture: Architecture, split: str) -> float:
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        return super().accuracy(architecture, split)


@pytest.mark.parametrize("sampler", ["guided", "nsga2", "tpe", "random"])
def test_a_search_that_was_killed_ends_like_one_that_was_not(sampler: str, tmp_path: Path, toy: ProfiledDevice) -> None:
    space = tiny.space()
    objectives = [maximize("accuracy"), minimize("latency_ms", toy), minimize("model_bytes")]
    whole = tiny.FakeEvaluator(space)
    trials = 25 if sampler == "random" else 45  # in SQLite, which is slow
    expected = run(whole, objectives, sampler=sampler, trials=trials, population=6)
    storage = storage_url(tmp_path) if sampler == "random" else optuna.storages.InMemoryStorage()
    asked, starts = [], 0
    while True:
        evaluator = Mortal(space, 11 if len(asked) < 22 else 1)  # where the sampler chooses, after every step
        starts += 1
        try:
            front = run(evaluator, objectives, sampler=sampler, trials=trials, population=6, storage=storage)
        except Killed:
            asked += evaluator.asked
            continue
        asked += evaluator.asked
        break
    assert starts > 4
    assert asked == whole.asked
    assert front == expected


def test_what_failed_waits_for_whoever_goes_on() -> None:
    class Broken(Mortal):
        def accuracy(self, architecture: Architecture, split: str) -> float:
            try:
                return super().accuracy(architecture, split)
            except Killed:
                raise OSError("no memory is left") from None

    storage = optuna.storages.InMemoryStorage()
    with pytest.raises(OSError, match="no memory"):
        run(Broken(tiny.space(), 5), [maximize("accuracy"), minimize("macs")], storage=storage)
    trials = optuna.load_study(study_name=None, storage=storage).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE"] * 5 + ["FAIL", "WAITING"]
    assert trials[6].system_attrs["fixed_params"] == trials[5].params


def test_every_step_of_a_sampler_draws_anew() -> None:
    """Else it would draw what is known, and all but the first architectures would be relatives of one."""
    storage = optuna.storages.InMemoryStorage()
    wanted = [maximize("accuracy"), minimize("macs")]
    run(tiny.FakeEvaluator(tiny.space()), wanted, sampler="random", trials=45, population=2, storage=storage)
    trials = optuna.load_study(study_name=None, storage=storage).trials
    assert sum("duplicate_of" in trial.user_attrs for trial in trials) < 15


def test_it_goes_on_where_it_died_between_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between putting a trial in the queue and asking for it, and right after a trial was told."""
    space = tiny.space(**SMALL)
    objectives = [maximize("accuracy"), minimize("macs")]
    whole = tiny.FakeEvaluator(space)
    expected = run(whole, objectives, trials=70)
    real = {"ask": optuna.Study.ask, "tell": optuna.Study.tell}
    storage = optuna.storages.InMemoryStorage()
    left = 0

    def mortal(name: str) -> Any:
        def call(study: optuna.Study, *args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0 and name == "ask":
                raise Killed
            result = real[name](study, *args, **options)
            if left < 0:
                raise Killed
            return result

        return call

    for name in real:
        monkeypatch.setattr(optuna.Study, name, mortal(name))
    asked = []
    for lives in (3, 1, 9, 20, 45, 2, 30, 1000):
        left = lives
        evaluator = tiny.FakeEvaluator(space)
        try:
            front = run(evaluator, objectives, trials=70, storage=storage)
        except Killed:
            continue
        finally:
            asked += evaluator.asked
    assert front == expected
    assert set(asked) == set(whole.asked)
    assert len(asked) - len(set(asked)) <= 7  # at most what was under way at each of the seven deaths


def test_more_trials_go_on_and_another_search_starts_anew() -> None:
    space, storage = tiny.space(), optuna.storages.InMemoryStorage()
    objectives = [maximize("accuracy"), minimize("macs")]
    counts = []
    for key, limits, trials in [
        ("one", [], 20),
        ("one", [], 30),
        ("one", [], 30),
        ("two", [], 20),
        ("one", [at_most("params", 10**9)], 20),
    ]:
        evaluator = tiny.FakeEvaluator(space, key)
        run(evaluator, objectives, limits, trials=trials, storage=storage)
        counts.append(len(evaluator.asked))
    assert counts == [20, 10, 0, 20, 20]


def test_the_study_is_named_after_all_its_values_depend_on(tmp_path: Path, toy: ProfiledDevice) -> None:
    evaluator: Any = tiny.FakeEvaluator(tiny.space())
    slower = ProfiledDevice(tiny.device(tmp_path, threads=2))
    base: dict[str, Any] = {
        "evaluator": evaluator,
        "objectives": [maximize("accuracy"), minimize("latency_ms", "toy")],
        "limits": [at_most("macs", 1_048_576)],
        "devices": {"toy": toy},
        "settings": nas.SearchSettings(),
        "seed": 0,
    }
    changes: list[dict[str, Any]] = [
        {},
        {"evaluator": tiny.FakeEvaluator(tiny.space(), "other weights")},
        {"objectives": [maximize("accuracy"), maximize("latency_ms", "toy")]},
        {"limits": [at_most("macs", 1_048_577)]},
        {"limits": [at_least("macs", 1_048_576)]},
        {"devices": {"toy": slower}},
        {"settings": nas.SearchSettings(sampler="tpe")},
        {"settings": nas.SearchSettings(population=9)},
        {"seed": 1},
    ]
    names = [study_name(**(base | change)) for change in changes]
    assert len(set(names)) == len(names)
    assert study_name(**(base | {"settings": nas.SearchSettings(trials=7)})) == names[0]


def test_the_key_of_an_evaluator_knows_weights_data_and_calibration() -> None:
    keys = [
        Evaluator(tiny.supernet(), tiny.data()).key,
        Evaluator(tiny.supernet(), tiny.data()).key,
        Evaluator(tiny.supernet(1), tiny.data()).key,
        Evaluator(tiny.supernet(), tiny.data(count=243)).key,
        Evaluator(tiny.supernet(), tiny.data(), calibration=32).key,
    ]
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_a_calibration_that_leaves_one_image_over_is_split_evenly() -> None:
    """A norm of a 1x1 map has no variance over a batch of one image."""
    space = MobileNet(
        resolutions=(8,), channels=1, classes=2, widths=(8, 8, 8), strides=(2, 2, 2), depths=(1,), kernels=(3,),
        stem_stride=1, expansions=(2,), width_multipliers=(1,),
    )  # fmt: skip
    x = np.random.default_rng(0).integers(0, 256, (200, 8, 8), dtype=np.uint8)
    data = nas.from_arrays(x, np.arange(200) % 2, calibration=129, test=0.1)
    deployed = Evaluator(Supernet(space), data, calibration=129).deploy(space.largest)
    assert deployed.simulated.network.by_name["head"].out_shape == (128, 1, 1)


# storages ------------------------------------------------------------------------------------------------


def test_the_study_is_an_ordinary_one(tmp_path: Path, toy: ProfiledDevice) -> None:
    evaluator = tiny.FakeEvaluator(tiny.space())
    limit = at_most(
        "macs",
        float(
            np.median([evaluator.space.lower(evaluator.space.sample(np.random.default_rng(i))).macs for i in range(40)])
        ),
    )
    run(
        evaluator,
        [maximize("accuracy"), minimize("latency_ms", toy)],
        [limit],
        storage=storage_url(tmp_path),
        trials=20,
        population=4,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert [d.name for d in study.directions] == ["MAXIMIZE", "MINIMIZE"]
    complete = [t for t in study.trials if t.state == TrialState.COMPLETE]
    assert len(complete) == 20
    for trial in complete:
        architecture = evaluator.space.parse(trial.user_attrs["architecture"])
        macs = evaluator.space.lower(architecture).macs
        assert trial.constraints[str(limit)] == pytest.approx((macs - limit.value) / limit.value)
        if macs <= limit.value:
            assert trial.values[0] == tiny.formula(architecture, "val_search")
        else:
            assert "accuracy" not in trial.user_attrs["figures"]
    assert all(max(t.constraints.values()) <= 0 for t in study.best_trials)


@pytest.mark.parametrize("kind", ["memory", "sqlite", "journal", "object"])
def test_any_storage_gives_the_same_front(kind: str, tmp_path: Path) -> None:
    storages: dict[str, Any] = {
        "memory": None,
        "sqlite": storage_url(tmp_path),
        "journal": f"journal://{tmp_path / 'study.log'}",
        "object": optuna.storages.InMemoryStorage(),
    }
    objectives = [maximize("accuracy"), minimize("macs")]
    few = {"trials": 16, "population": 4}
    expected = run(tiny.FakeEvaluator(tiny.space()), objectives, **few)
    first, again = tiny.FakeEvaluator(tiny.space()), tiny.FakeEvaluator(tiny.space())
    assert run(first, objectives, storage=storages[kind], **few) == expected
    assert run(again, objectives, storage=storages[kind], **few) == expected
    assert len(again.asked) == (16 if kind == "memory" else 0)


def test_the_same_seed_searches_the_same() -> None:
    fronts = [
        run(tiny.FakeEvaluator(tiny.space()), [maximize("accuracy"), minimize("macs")], seed=s) for s in (1, 1, 2)
    ]
    assert fronts[0] == fronts[1] != fronts[2]


# real evaluation -----------------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_network_that_would_be_exported() -> None:
    """Against onnxruntime on the same split, for fp32 and int8."""
    import onnxruntime

    from hardware_profiles.onnx_writer import write_onnx

    data, net = tiny.data(), tiny.supernet()
    evaluator = Evaluator(net, data)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for precision in ("fp32", "int8"):
        architecture = net.space.with_precision(net.space.largest, precision)
        deployed = evaluator.deploy(architecture)
        model = write_onnx(
            deployed.folded.network, deployed.folded.weights(), deployed.ranges, weight_limit=evaluator.weight_limit
        )
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        split = data["val_front"]
        correct = 0
        for x, labels in data.batches("val_front", 8):
            correct += int((session.run(None, {"input": x.numpy()})[0].argmax(1) == labels.numpy()).sum())
        assert evaluator.accuracy(architecture, "val_front") == pytest.approx(
            correct / len(split), abs=1.5 / len(split)
        )


def test_the_nested_family_is_a_front_without_a_search(toy: ProfiledDevice) -> None:
    space, wanted = tiny.space(), [maximize("accuracy"), minimize("latency_ms", toy)]
    evaluator = tiny.FakeEvaluator(space)
    net: Any = _Net(space)
    front = nas.nested_front(net, None, wanted, evaluator=evaluator)  # type: ignore[arg-type]
    asked = [a for a, _ in evaluator.asked]
    assert {space.smallest, space.largest} <= set(asked) and len(asked) == len(set(asked)) < 30
    assert {p.architecture for p in (*front.points, *front.others)} == {str(a) for a in asked}
    searched = tiny.FakeEvaluator(space)
    run(searched, wanted, trials=len(asked) + 5)
    assert set(asked) <= {a for a, _ in searched.asked}  # a search evaluates them first
    bound = space.lower(asked[3]).macs
    within = nas.nested_front(net, None, wanted, [at_most("macs", bound)], evaluator=evaluator)  # type: ignore[arg-type]
    assert within.points and all(point["macs"] <= bound for point in (*within.points, *within.others))
    with pytest.raises(Infeasible, match="nested family"):
        nas.nested_front(net, None, wanted, [at_most("macs", 10)], evaluator=evaluator)  # type: ignore[arg-type]
    with pytest.raises(Infeasible, match="nested family"):
        nas.nested_front(net, None, wanted, [at_least("accuracy", 0.999)], evaluator=evaluator)  # type: ignore[arg-type]


def test_what_is_dominated_for_sure_is_not_evaluated_to_the_end(toy: ProfiledDevice) -> None:
    """Each stage is judged by what was evaluated before, and the front is that of whole evaluations."""
    evaluator = Staged(tiny.space())
    front = run(evaluator, [maximize("accuracy"), minimize("latency_ms", toy)], trials=60)
    whole = {str(a): evaluator.seen[a] for a, _ in evaluator.asked if evaluator.seen[a] == 10_000}
    assert 0 < len(whole) < 60
    assert {p.architecture for p in (*front.points, *front.others)} == set(whole)
    ends = {(p["accuracy"], p["latency_ms@toy"]) for p in front.points}
    for architecture, _ in evaluator.asked:  # what was stopped is dominated indeed
        latency = toy.figure(evaluator.space.lower(architecture), "latency_ms").value
        share = tiny.formula(architecture, "val_search")
        assert str(architecture) in whole or any(a >= share and ms <= latency for a, ms in ends)


def test_what_stops_an_evaluation_is_what_was_evaluated_before_its_generation(toy: ProfiledDevice) -> None:
    """So that it does not matter who of a generation is faster; the stages are judged again here, trial by trial."""
    evaluator, storage = Staged(tiny.space()), optuna.storages.InMemoryStorage()
    run(evaluator, [maximize("accuracy"), minimize("latency_ms", toy)], trials=60, storage=storage, population=8)
    study = optuna.load_study(study_name=None, storage=storage)
    sampler = nas.PredictorGuidedSampler(startup=8, search_space={"any": optuna.distributions.IntDistribution(0, 1)})
    whole: dict[int, tuple[float, float]] = {}
    stopped = 0
    for trial in study.trials:
        architecture = evaluator.space.parse(trial.user_attrs["architecture"])
        start, (_, latency_ms) = sampler.generation_start(study, trial.number), trial.values
        bar = max((a for number, (a, ms) in whole.items() if number < start and ms <= latency_ms), default=-1.0)
        shares = [(n, Score(round(n * tiny.formula(architecture, "val_search")), n, 10_000)) for n in STAGES]
        expected = next((n for n, score in shares if score.at_most < bar), STAGES[-1])
        assert evaluator.seen[architecture] == expected == trial.user_attrs.get("images_seen", STAGES[-1])
        if expected == STAGES[-1]:
            whole[trial.number] = (trial.values[0], latency_ms)
        stopped += expected < STAGES[-1]
    assert 0 < stopped < 60


def test_an_evaluation_stops_where_a_floor_of_accuracy_is_out_of_reach() -> None:
    evaluator = Staged(tiny.space())
    shares = sorted(tiny.formula(evaluator.space.sample(np.random.default_rng(i)), "val_search") for i in range(40))
    floor = shares[20]
    front = run(evaluator, [minimize("macs")], [at_least("accuracy", floor)], trials=30)
    for architecture, seen in evaluator.seen.items():
        share = tiny.formula(architecture, "val_search")
        assert share < floor or seen == STAGES[-1]
        assert share > floor - 0.05 or seen == STAGES[0]  # three standard errors of 1,250 images are 0.04
    assert len(set(evaluator.seen.values())) > 1
    assert all(point["accuracy"] >= floor for point in (*front.points, *front.others))


def test_trials_that_were_not_run_say_so() -> None:
    """Their accuracy of 0 teaches a sampler nothing."""
    evaluator, storage = tiny.FakeEvaluator(tiny.space()), optuna.storages.InMemoryStorage()
    bound = float(
        np.median([evaluator.space.lower(evaluator.space.sample(np.random.default_rng(i))).macs for i in range(40)])
    )
    run(evaluator, [maximize("accuracy")], [at_most("macs", bound)], sampler="random", trials=30, storage=storage)
    trials = optuna.load_study(study_name=None, storage=storage).get_trials(states=(TrialState.COMPLETE,))
    unmeasured = [trial for trial in trials if trial.user_attrs.get(UNMEASURED)]
    assert len(unmeasured) == 30 - len(evaluator.asked) > 0
    assert all("accuracy" not in trial.user_attrs["figures"] and trial.values == [0.0] for trial in unmeasured)


def test_what_another_process_runs_or_has_run_is_a_duplicate() -> None:
    text = str(tiny.space().smallest)
    for state, holds in (("RUNNING", True), ("COMPLETE", True), ("PRUNED", False), ("FAIL", False), ("WAITING", False)):
        values = [1.0] if state == "COMPLETE" else None
        trial = optuna.trial.create_trial(state=TrialState[state], values=values, user_attrs={"architecture": text})
        assert _holds(trial, tiny.space().smallest) == holds and not _holds(trial, tiny.space().largest)


STAGES = (1_250, 2_500, 5_000, 10_000)  # images


class Staged(tiny.FakeEvaluator):
    """As right on the first images as on all of them."""

    def __init__(self, space: SearchSpace) -> None:
        super().__init__(space)
        self.seen: dict[Architecture, int] = {}

    def score(self, architecture: Architecture, split: str, is_enough: Callable[[Score], bool]) -> Score:
        share = self.accuracy(architecture, split)
        for seen in STAGES:
            self.seen[architecture] = seen
            score = Score(round(seen * share), seen, 10_000)
            if is_enough(score):
                break
        return score


@pytest.mark.parametrize("ended", [True, False])
def test_a_trial_that_ended_since_it_was_seen_is_not_waited_for(ended: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    search_module = importlib.import_module("nas.search")  # nas.search is the function
    monkeypatch.setattr(search_module, "PATIENCE_S", 0.5)
    monkeypatch.setattr(search_module, "POLL_S", 0.01)
    study = optuna.create_study()
    seen = study.ask()
    if ended:
        study.tell(seen, 1.0)
    waits = object.__new__(search_module._Search)  # waiting needs nothing of the search but its study
    assert waits._waited(study, {seen.number}) == ended
