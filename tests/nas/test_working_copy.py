"""What a study at work in memory leaves in its file, read back by Optuna itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from nas.costs import maximize, minimize
from nas.study import open_study, storage_url
from nas.working_copy import WorkingCopy

OBJECTIVES = [maximize("accuracy"), minimize("macs")]
SPACE: dict[str, optuna.distributions.BaseDistribution] = {
    "width": CategoricalDistribution((8, 16, "all", None)),
    "depth": IntDistribution(1, 9, step=2),
    "rate": FloatDistribution(1e-4, 1.0, log=True),
}


@pytest.fixture(params=["sqlite", "journal"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BaseStorage]:
    if request.param == "journal":
        yield JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
        return
    storage = RDBStorage(storage_url(tmp_path))
    yield storage
    storage.remove_session()
    storage.engine.dispose()


def studies(kept: BaseStorage) -> tuple[optuna.Study, optuna.Study]:
    """A study, and the working copy of it."""
    study = optuna.create_study(storage=kept, study_name="s", directions=["maximize", "minimize"])
    return study, copy_of(kept)


def copy_of(kept: BaseStorage) -> optuna.Study:
    copy = WorkingCopy(kept, kept.get_study_id_from_name("s"))
    return optuna.load_study(storage=copy, study_name="s")


def facts(trial: FrozenTrial) -> dict[str, Any]:
    """All of a trial but the id that a storage gives it."""
    known = {name: value for name, value in vars(trial).items() if name not in ("_trial_id", "trial_id")}
    known["intermediate_values"] = {k: str(v) for k, v in trial.intermediate_values.items()}  # not a number is none
    return known


def drawn(study: optuna.Study, rng: np.random.Generator) -> None:
    """A trial with a bit of everything that Optuna can hold, which ends in some way."""
    trial = study.ask({name: SPACE[name] for name in rng.permutation(list(SPACE))[: rng.integers(1, 4)]})
    trial.set_user_attr("figures", {"macs": {"value": rng.random(), "low": None}, "names": ["a", "é"]})
    trial.set_constraint("macs<=5", float(rng.normal()))
    state = [TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL][rng.integers(4)]
    for step in range(0 if state == TrialState.PRUNED else rng.integers(0, 3)):
        value = float(rng.choice([1.5, math.nan, -math.inf]))
        study._storage.set_trial_intermediate_value(trial._trial_id, step, value)
    values = [float(rng.choice([rng.random(), math.inf, -math.inf])), float(rng.integers(9))]
    if state == TrialState.COMPLETE:
        study.tell(trial, values)
    else:
        study.tell(trial, state=state)


def test_every_trial_that_ended_is_what_optuna_would_have_written(kept: BaseStorage) -> None:
    study, copy = studies(kept)
    rng = np.random.default_rng(0)
    copy.set_user_attr("begun", True)
    for number in range(30):
        drawn(copy, rng)
        assert len(study.get_trials()) == number + 1
    assert study.user_attrs == {"begun": True}
    assert [facts(t) for t in study.get_trials()] == [facts(t) for t in copy.get_trials()]
    assert {t.state for t in study.trials} == {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    again = copy_of(kept)
    assert [facts(t) for t in again.get_trials()] == [facts(t) for t in copy.get_trials()]
    assert again.user_attrs == {"begun": True}


def test_what_had_not_ended_is_not_known_afterwards_and_its_number_is_free(kept: BaseStorage) -> None:
    study, copy = studies(kept)
    copy.enqueue_trial({"depth": 3})
    copy.ask(SPACE)
    assert study.get_trials() == []
    assert copy_of(kept).ask(SPACE).number == 0


def test_trials_that_wait_or_run_in_the_storage_end_there_once(kept: BaseStorage) -> None:
    study, _ = studies(kept)
    running = study.ask()
    running.suggest_categorical("width", SPACE["width"].choices)  # type: ignore[attr-defined]
    study.enqueue_trial({"depth": 3}, user_attrs={"why": "nested"})
    copy = copy_of(kept)
    copy.tell(running.number, state=TrialState.FAIL)
    waiting = copy.ask(SPACE)
    assert waiting.params["depth"] == 3
    waiting.set_user_attr("architecture", "a")
    copy._storage.set_trial_intermediate_value(waiting._trial_id, 3, 0.75)
    copy.tell(waiting, [0.5, 2.0])
    copy.tell(copy.ask(SPACE), [0.25, 1.0])
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "COMPLETE", "COMPLETE"]
    first, second, third = study.get_trials()
    assert first.params == running.params
    assert second.params == waiting.params and second.values == [0.5, 2.0]
    assert second.user_attrs == {"why": "nested", "architecture": "a"} and second.intermediate_values == {3: 0.75}
    assert third.values == [0.25, 1.0]


def test_finished_trials_that_are_added_are_kept_and_enqueued_ones_only_once_they_end(kept: BaseStorage) -> None:
    study, copy = studies(kept)
    copy.add_trial(
        optuna.trial.create_trial(params={"depth": 3}, distributions={"depth": SPACE["depth"]}, values=[1, 2])
    )
    copy.enqueue_trial({"depth": 5})
    assert [t.params for t in study.get_trials()] == [{"depth": 3}]
    copy.tell(copy.ask({"depth": SPACE["depth"]}), [1, 1])
    assert [t.params for t in study.get_trials()] == [{"depth": 3}, {"depth": 5}]


def test_a_genetic_sampler_goes_on_in_the_storage_itself_with_the_same_parents(kept: BaseStorage) -> None:
    """They keep their parents in the study by ids, which are others in memory."""

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        values = [trial.suggest_int(f"x{i}", 0, 9) for i in range(4)]
        return sum(values), float(values[0] * values[1])

    other = optuna.create_study(storage=kept, study_name="other")  # so that ids differ by more than one
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
    copy = studies(kept)[1]
    copy.sampler = optuna.samplers.NSGAIISampler(seed=0, population_size=6)
    copy.optimize(objective, n_trials=14)
    ends = []
    for again in (copy_of(kept), optuna.load_study(study_name="s", storage=kept)):
        again.sampler = genetic = optuna.samplers.NSGAIISampler(seed=1, population_size=6)
        parents = genetic.get_parent_population(again, 2)
        ends.append(sorted(trial.number for trial in parents))
    assert ends[0] == ends[1] and len(ends[0]) == 6


def test_a_trial_is_one_transaction(tmp_path: Path) -> None:
    with open_study(storage_url(tmp_path), "s", OBJECTIVES) as opened:
        study = opened.study
        assert isinstance(study._storage, WorkingCopy)
        commits = 0

        def count(connection: object) -> None:
            nonlocal commits
            commits += 1

        event.listen(study._storage._kept.engine, "commit", count)  # type: ignore[attr-defined]
        for _ in range(3):
            drawn(study, np.random.default_rng(0))
        assert commits == 3


def test_files_that_are_shared_are_not_copied(tmp_path: Path) -> None:
    for storage, shared in ((storage_url(tmp_path), True), (None, False), (optuna.storages.InMemoryStorage(), False)):
        with open_study(storage, "s", OBJECTIVES, shared=shared) as opened:
            assert not isinstance(opened.study._storage, WorkingCopy)


def test_other_studies_are_for_the_storage_itself(kept: BaseStorage) -> None:
    _, copy = studies(kept)
    with pytest.raises(NotImplementedError, match="storage itself"):
        optuna.create_study(storage=copy._storage, study_name="t")
    with pytest.raises(NotImplementedError, match="storage itself"):
        optuna.delete_study(storage=copy._storage, study_name="s")
