"""The guided sampler with every kind of study: nothing twice, repeatable, limits, queues, workers."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from nas import PredictorGuidedSampler, guided_sampler
from nas.guided_sampler import UNMEASURED, Grid, SpaceUsedUp, common_space, options_of, results_of
from predictors.proposals import Domain

optuna.logging.set_verbosity(optuna.logging.ERROR)
NAMES = ("a", "b", "c")


def objective(trial: Trial, objectives: int = 2) -> tuple[float, ...]:
    kind = trial.suggest_categorical("kind", NAMES)
    width = trial.suggest_int("width", 8, 32, step=8)
    rate = trial.suggest_float("rate", 0.0, 1.0, step=0.25)
    place = NAMES.index(kind)
    values = (width * (1 + place), -width - 3.0 * place + rate, rate + place, (rate - 0.5) ** 2 - width)
    return values[:objectives]


def searched(trials: int, objectives: int = 2, sampler: PredictorGuidedSampler | None = None) -> optuna.Study:
    sampler = sampler or PredictorGuidedSampler(seed=1, startup=8, batch=4)
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    study.optimize(lambda trial: objective(trial, objectives), n_trials=trials)
    return study


def told(study: optuna.Study) -> list[tuple[object, ...]]:
    return [tuple(trial.params[name] for name in sorted(trial.params)) for trial in study.trials if trial.params]


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_nothing_twice_and_the_same_again(objectives: int) -> None:
    first = told(searched(24, objectives))
    assert len(set(first)) == 24
    assert first == told(searched(24, objectives))


def test_options_of_distributions() -> None:
    assert options_of(CategoricalDistribution(("x", None))) == ("x", None)
    assert options_of(IntDistribution(1, 7, step=3)) == (1, 4, 7)
    assert options_of(FloatDistribution(0.0, 1.0, step=0.5)) == (0.0, 0.5, 1.0)
    many = options_of(IntDistribution(1, 1000, log=True))
    assert many[0] == 1 and many[-1] == 1000 and len(many) <= 32 and all(isinstance(x, int) for x in many)
    reals = options_of(FloatDistribution(1e-4, 1.0, log=True))
    np.testing.assert_allclose(np.diff(np.log(reals)), np.log(1e4) / 31)


def test_a_space_that_is_used_up_ends_the_study() -> None:
    study = searched(100)
    assert len(set(told(study))) == 3 * 4 * 5
    assert [t.state for t in study.trials].count(TrialState.COMPLETE) == 60
    assert [t.state for t in study.trials].count(TrialState.PRUNED) == 1


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_study_with_parameters_of_some_trials_goes_on_once_the_others_are_used_up(asynchronous: bool) -> None:
    study = optuna.create_study(directions=["minimize"] * 2, sampler=PredictorGuidedSampler(asynchronous=asynchronous))

    def branching(trial: Trial) -> tuple[float, float]:
        if trial.suggest_categorical("branch", ["x", "y"]) == "x":
            return trial.suggest_float("u", 0.0, 1.0), 1.0
        return float(trial.suggest_int("v", 0, 1000)), 2.0

    study.optimize(branching, n_trials=60)
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 60
    assert {trial.params["branch"] for trial in study.trials[20:]} == {"x", "y"}
    assert len({tuple(trial.params.items()) for trial in study.trials}) > 50  # whole numbers may come twice


def test_what_is_repeated_is_allowed_and_nothing_is_repeated_where_nothing_is_allowed() -> None:
    space = {"branch": CategoricalDistribution(("x", "y", "z"))}

    def branching(trial: Trial) -> tuple[float, float]:
        return trial.suggest_float(trial.suggest_categorical("branch", ["x", "y", "z"]), 0.0, 1.0), 1.0

    some = PredictorGuidedSampler(search_space=space, allowed=lambda codes: codes[:, 0] < 2)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=some)
    study.optimize(branching, n_trials=16)
    assert {trial.params["branch"] for trial in study.trials} == {"x", "y"} and len(study.trials) == 16
    study.sampler = PredictorGuidedSampler(search_space=space, allowed=lambda codes: codes[:, 0] < 0)
    with pytest.raises(SpaceUsedUp, match="after 16 trials"):
        branching(study.ask())


def test_functions_of_codes_may_give_lists() -> None:
    space = {"x": IntDistribution(0, 5), "y": IntDistribution(0, 5)}

    def given(name: str, function: Any) -> list[tuple[object, ...]]:
        functions = {"canonical": lambda c: c, "allowed": lambda c: c[:, 0] < 4, "exact": {1: lambda c: c[:, 1] * 1.0}}
        functions |= {name: function(functions[name])}
        sampler = PredictorGuidedSampler(startup=4, batch=2, search_space=space, **functions)  # type: ignore[arg-type]
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        study.optimize(lambda t: (t.suggest_int("x", 0, 5) ** 2, t.suggest_int("y", 0, 5)), n_trials=8)
        return told(study)

    as_arrays = given("allowed", lambda f: f)
    for name in ("canonical", "allowed"):
        assert given(name, lambda f: lambda codes: f(codes).tolist()) == as_arrays
    assert given("exact", lambda f: {1: lambda codes: f[1](codes).tolist()}) == as_arrays


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"allowed": lambda codes: False}, r"allowed gave bool of shape \(\) .* expected booleans of shape \(\d+,\)"),
        ({"allowed": lambda codes: codes[:, 0]}, "allowed gave int64 .* expected booleans"),
        ({"canonical": lambda codes: codes[:, :1]}, r"canonical gave int64 of shape \(\d+, 1\) .* expected numbers"),
        ({"exact": {1: lambda codes: 3.0}}, r"exact\[1\] gave float64 of shape \(\)"),
    ],
)
def test_functions_of_codes_that_give_another_shape_are_refused(given: dict[str, Any], message: str) -> None:
    space = {name: optuna.distributions.IntDistribution(0, 3) for name in ("x", "y", "z")}
    study = optuna.create_study(
        directions=["minimize"] * 2, sampler=PredictorGuidedSampler(startup=2, search_space=space, **given)
    )
    with pytest.raises(ValueError, match=message):
        study.optimize(lambda trial: tuple(trial.suggest_int(name, 0, 3) for name in space)[:2], n_trials=4)


def test_codes_that_are_the_same_or_not_allowed_are_not_proposed() -> None:
    """Codes are in the order of the names: kind, rate, width."""

    def canonical(codes: np.ndarray) -> np.ndarray:
        return np.where((codes[:, :1] == 0) & (np.arange(3) == 1), 0, codes)  # kind "a" has no rate

    sampler = PredictorGuidedSampler(
        seed=1, startup=8, canonical=canonical, allowed=lambda codes: codes[:, 2] < 3,
        search_space={
            "kind": CategoricalDistribution(NAMES),
            "rate": FloatDistribution(0.0, 1.0, step=0.25),
            "width": IntDistribution(8, 32, step=8),
        },
    )  # fmt: skip
    rows = told(searched(100, sampler=sampler))
    assert len(rows) == len(set(rows)) == 3 * (1 + 5 + 5)
    assert all(width < 32 and (kind != "a" or rate == 0) for kind, rate, width in rows)


def test_exact_objectives_and_reference_are_in_the_units_of_the_study() -> None:
    """Directions are maximized here; all trials after the first are proposals of a known second objective."""
    space = {"x": IntDistribution(0, 15), "y": IntDistribution(0, 15)}
    sampler = PredictorGuidedSampler(
        seed=0, startup=6, batch=2, search_space=space, reference=(0.0, 0.0), exact={1: lambda codes: codes[:, 1] * 1.0}
    )
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    study.optimize(lambda t: (15 - t.suggest_int("y", 0, 15) + t.suggest_int("x", 0, 15), t.params["y"]), n_trials=26)
    assert np.mean([trial.params["x"] for trial in study.trials[-10:]]) > 11
    with pytest.raises(ValueError, match="reference"):
        searched(2, sampler=PredictorGuidedSampler(search_space=space, reference=(1.0,)))


def test_constraints_keep_proposals_feasible() -> None:
    def limited(trial: Trial) -> tuple[float, ...]:
        values = objective(trial)
        trial.set_constraint("width", trial.params["width"] - 16.0)
        return values

    study = optuna.create_study(directions=["minimize"] * 2, sampler=PredictorGuidedSampler(seed=2, startup=12))
    study.optimize(limited, n_trials=30)
    assert np.mean([trial.params["width"] <= 16 for trial in study.trials[15:]]) > 0.75


def test_enqueued_pruned_and_failed_trials() -> None:
    sampler = PredictorGuidedSampler(seed=1, startup=8, batch=4)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    study.enqueue_trial({"kind": "b", "width": 16, "rate": 0.5})
    study.enqueue_trial({"kind": "c"})

    def troubled(trial: Trial) -> tuple[float, ...]:
        values = objective(trial)
        if trial.number % 5 == 3:
            raise optuna.TrialPruned
        if trial.number % 5 == 4:
            raise OSError("lost")
        return values

    study.optimize(troubled, n_trials=40, catch=(OSError,))
    rows = told(study)
    assert len(set(rows)) == len(rows) == 40
    assert rows[0] == ("b", 0.5, 16) and rows[1][0] == "c"


def test_a_study_that_was_stopped_goes_on_as_one_that_was_not(tmp_path: Path) -> None:
    def part(trials: int, file: str) -> list[tuple[object, ...]]:
        study = optuna.create_study(
            study_name="s", storage=f"sqlite:///{tmp_path / file}", load_if_exists=True,
            directions=["minimize"] * 2, sampler=PredictorGuidedSampler(seed=3, startup=6, batch=4),
        )  # fmt: skip
        study.optimize(objective, n_trials=trials)
        return told(study)

    part(9, "halves.db")
    assert part(9, "halves.db") == part(18, "whole.db")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_workers_share_a_journal(tmp_path: Path, asynchronous: bool) -> None:
    def work(file: str, trials: int) -> None:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / file))
        sampler = PredictorGuidedSampler(seed=4, startup=6, batch=4, asynchronous=asynchronous, poll_s=0.01)
        study = optuna.create_study(
            study_name="s", storage=optuna.storages.JournalStorage(backend), load_if_exists=True,
            directions=["minimize"] * 2, sampler=sampler,
        )  # fmt: skip
        study.optimize(objective, n_trials=trials)

    def rows(file: str) -> list[tuple[object, ...]]:
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / file))
        return told(optuna.load_study(study_name="s", storage=optuna.storages.JournalStorage(backend)))

    work("two", 1)  # so that both find the study
    workers = [threading.Thread(target=work, args=("two", 10)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    both = rows("two")
    assert len(both) == len(set(both)) == 21
    if not asynchronous:
        work("one", 21)
        assert both == rows("one")


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="startup 1"):
        PredictorGuidedSampler(startup=1)


# what a generation rests on ------------------------------------------------------------------------------

PAIR: dict[str, BaseDistribution] = {"x": IntDistribution(0, 9), "y": IntDistribution(0, 9)}


def ended(x: int, y: int, state: TrialState = TrialState.COMPLETE, **told: Any) -> FrozenTrial:
    values = [float(x), float(y)] if state == TrialState.COMPLETE else None
    return create_trial(state=state, params={"x": x, "y": y}, distributions=PAIR, **({"values": values} | told))


def paired(sampler: PredictorGuidedSampler, trials: list[FrozenTrial] | None = None) -> optuna.Study:
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
    study.add_trials(trials or [])
    return study


def asked(study: optuna.Study) -> tuple[int, int]:
    trial = study.ask()
    return trial.suggest_int("x", 0, 9), trial.suggest_int("y", 0, 9)


def test_generations_are_the_first_ones_then_a_batch_then_a_tenth() -> None:
    sampler = PredictorGuidedSampler(startup=20, batch=5, search_space=PAIR)
    study = paired(sampler, [ended(n // 10, n % 10) for n in range(80)])
    starts = [sampler.generation_start(study, n) for n in range(80)]
    sizes = [len(list(group)) for _, group in itertools.groupby(starts)]
    assert sizes == [20, *[5] * 8, 6, 6, 7, 1] and starts == sorted(starts) and starts[20] == 20
    unknown = PredictorGuidedSampler(startup=20, batch=5)  # the first trial tells which parameters there are
    assert {unknown.generation_start(study, n) for n in range(20)} == {0, 1}


def test_a_retry_counts_as_the_trial_that_it_repeats() -> None:
    half = create_trial(state=TrialState.FAIL, params={"x": 3}, distributions={"x": PAIR["x"]})
    again: dict[str, Any] = {"failed_trial": 3, "retry_history": [3], "fixed_params": {"x": 3}}
    trials = [ended(0, 0), ended(1, 1), ended(2, 2), half, *(ended(n, n) for n in (5, 6, 7, 8)), ended(3, 0)]
    trials[-1].system_attrs = again
    sampler = PredictorGuidedSampler(startup=4, batch=2)
    study = paired(sampler, trials)
    assert [sampler.generation_start(study, n) for n in range(9)] == [0, 1, 1, 1, 4, 4, 6, 6, 1]
    study.ask()  # what was asked of the one that failed is not all that there is
    assert sampler.infer_relative_search_space(study, study.trials[-1]) == PAIR


def test_what_trials_tell_is_costs_and_constraints_of_those_that_were_measured() -> None:
    study = paired(PredictorGuidedSampler(), [ended(3, 4, values=[np.inf, -np.inf]), ended(8, 8, TrialState.PRUNED)])
    study.add_trials([ended(9, 9, user_attrs={UNMEASURED: True}), ended(7, 7, TrialState.FAIL)])
    for x, y, constraints in ((1, 2, {"a": -1.0}), (5, 0, {"b": 2.0, "a": 0.5})):
        trial = study.ask()
        assert (trial.suggest_int("x", x, x), trial.suggest_int("y", y, y)) == (x, y)
        for name, value in constraints.items():
            trial.set_constraint(name, value)
        study.tell(trial, [float(x), float(y)])
    found = results_of(study.trials, Grid.of(PAIR), Domain((10, 10), (True, True)), study.directions)
    assert found.codes.tolist() == [[3, 4], [1, 2], [5, 0]]
    assert found.costs.tolist() == [[-5, 0], [-1, 2], [-5, 0]]  # infinite ones as the best finite ones
    np.testing.assert_array_equal(found.constraints, [[np.nan, np.nan], [-1, np.nan], [0.5, 2]])


def test_common_parameters_are_those_of_all_trials_alike() -> None:
    other: dict[str, BaseDistribution] = {"x": PAIR["x"], "y": IntDistribution(0, 5), "z": PAIR["x"]}
    trials = [ended(1, 2), create_trial(values=[0.0, 0.0], params={"x": 1, "y": 2, "z": 3}, distributions=other)]
    assert common_space(trials) == {"x": PAIR["x"]} and common_space([]) == {}
    waiting = create_trial(state=TrialState.WAITING)
    assert common_space([waiting, ended(0, 0)]) == PAIR


def test_a_number_between_two_options_is_the_nearer_one() -> None:
    grid = Grid.of({"x": FloatDistribution(0.0, 31.0), "kind": CategoricalDistribution((True, 1, "a"))})
    assert grid.code({"x": 6.4, "kind": 1}) == (6, 1)
    assert grid.code({"x": 6.6, "kind": True}) == (7, 0) and grid.code({"kind": "a"}) is None


def test_a_proposal_is_told_the_reference_as_costs_and_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []
    propose = guided_sampler.propose

    def kept(domain: Domain, results: Any, count: int, rng: np.random.Generator, **given: Any) -> np.ndarray:
        told.append(given | {"codes": results.codes})
        return propose(domain, results, count, rng, **given)

    monkeypatch.setattr(guided_sampler, "propose", kept)
    sampler = PredictorGuidedSampler(startup=4, batch=2, search_space=PAIR, reference=(5.0, 7.0), asynchronous=True)
    study = paired(sampler, [ended(n, n) for n in range(4)])
    one, two, three = asked(study), asked(study), asked(study)
    assert len({one, two, three}) == 3 and [each["reference"] for each in told] == [[-5.0, 7.0]] * 2
    assert told[0]["running"] is None and {tuple(row) for row in told[1]["running"].tolist()} == {one, two}
    assert len(told[1]["codes"]) == 4


def test_a_trial_that_waits_long_says_for_what(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guided_sampler, "NOTICE_S", 0.05)
    sampler = PredictorGuidedSampler(startup=2, batch=2, search_space=PAIR, poll_s=0.01, patience_s=0.3)
    study = paired(sampler, [ended(0, 0), ended(1, 7)])
    study.ask()
    study.ask()  # the generation after the first; neither ends
    assert "waits" not in caplog.text
    asked(study)
    waits = [message for message in caplog.messages if "waits up to 0 s for what trials 2, 3 find" in message]
    assert len(waits) == 1 and "study.tell(2, state=optuna.trial.TrialState.FAIL)" in waits[0]


def test_a_retry_is_told_in_the_place_of_the_trial_that_it_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[list[int]]] = []

    def kept(domain: Domain, results: Any, count: int, rng: np.random.Generator, **given: Any) -> np.ndarray:
        told.append(results.codes.tolist())
        return np.array([[9, 9], [9, 8]])

    monkeypatch.setattr(guided_sampler, "propose", kept)
    again = ended(1, 7)
    again.system_attrs = {"failed_trial": 1, "retry_history": [1], "fixed_params": {"x": 1, "y": 7}}
    lost, others = ended(1, 7, TrialState.FAIL), [ended(n, n) for n in (2, 3)]
    for trials in ([ended(0, 0), ended(1, 7), *others], [ended(0, 0), lost, *others, again]):
        asked(paired(PredictorGuidedSampler(startup=4, batch=2, search_space=PAIR), trials))
    assert told == [[[0, 0], [1, 7], [2, 2], [3, 3]]] * 2


def test_what_a_worker_claims_is_not_proposed_to_another() -> None:
    """Four of the four there are, before any of the workers has told more than one of the two parameters."""
    space: dict[str, BaseDistribution] = {name: IntDistribution(0, 1) for name in ("x", "y")}
    study, trials = paired(PredictorGuidedSampler()), []
    for _ in range(4):
        study.sampler = PredictorGuidedSampler(search_space=space, asynchronous=True)
        trials.append(study.ask())
        trials[-1].suggest_int("x", 0, 1)
    assert {(trial.params["x"], trial.suggest_int("y", 0, 1)) for trial in trials} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_what_was_enqueued_meanwhile_is_not_proposed_again() -> None:
    rows = [asked(study) for study in [paired(PredictorGuidedSampler(3, startup=6, search_space=PAIR))] for _ in "abc"]
    study = paired(PredictorGuidedSampler(3, startup=6, search_space=PAIR))
    assert asked(study) == rows[0]
    study.enqueue_trial({"x": rows[1][0], "y": rows[1][1]})
    assert asked(study) == rows[1]
    assert asked(study) not in rows and asked(study) == rows[2]


def test_what_enqueued_trials_leave_open_is_new_where_it_can_be() -> None:
    study = paired(PredictorGuidedSampler(startup=6, search_space=PAIR))
    for _ in range(10):
        study.enqueue_trial({"x": 4})
    assert sorted(asked(study) for _ in range(10)) == [(4, y) for y in range(10)]


def test_trials_of_earlier_generations_are_waited_for_as_long_as_they_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guided_sampler, "QUEUE_PATIENCE_S", 0.05)
    sampler = PredictorGuidedSampler(startup=3, batch=2, search_space=PAIR, poll_s=0.01)
    study = paired(sampler, [ended(0, 0), ended(1, 1)])
    asked(study)
    teller = threading.Timer(0.4, lambda: study.tell(2, [5.0, 5.0]))
    teller.start()
    asked(study)
    assert study.trials[2].state == TrialState.COMPLETE and "goes on without" not in caplog.text
    teller.join()


def test_killed_trials_are_looked_for_and_others_given_up_while_waiting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(guided_sampler, "fail_stale", lambda study: study.tell(2, state=TrialState.FAIL))
    sampler = PredictorGuidedSampler(startup=3, batch=2, search_space=PAIR, poll_s=0.01, patience_s=5.0)
    study = paired(sampler, [ended(0, 0), ended(1, 1)])
    asked(study)
    asked(study)
    assert study.trials[2].state == TrialState.FAIL and "goes on without" not in caplog.text
    monkeypatch.setattr(guided_sampler, "fail_stale", lambda study: None)
    sampler = PredictorGuidedSampler(startup=3, batch=2, search_space=PAIR, poll_s=0.01, patience_s=0.1)
    study = paired(sampler, [ended(0, 0), ended(1, 1)])
    first = asked(study)
    assert asked(study) != first and "trial 3 goes on without the results of trials 2" in caplog.text
