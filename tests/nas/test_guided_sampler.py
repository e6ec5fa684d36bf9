"""The guided sampler with every kind of study: nothing twice, repeatable, limits, queues, workers."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import Trial, TrialState

from nas import PredictorGuidedSampler
from nas.guided_sampler import options_of

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
