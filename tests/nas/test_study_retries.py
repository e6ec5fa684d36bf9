"""Storages of a study: heartbeats, what processes that were killed leave, and what SQLite is told."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import IntDistribution
from optuna.trial import TrialState
from sqlalchemy import text

from nas.costs import maximize, minimize
from nas.study import (
    BEAT_S,
    GRACE_S,
    MOST_RETRIES,
    fail_stale,
    is_of_one_machine,
    open_study,
    retry_failed,
    retry_running,
    storage_url,
)

OBJECTIVES = [maximize("accuracy"), minimize("macs")]


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[optuna.Study]:
    with open_study(storage_url(tmp_path), "s", OBJECTIVES, shared=True) as opened:
        assert opened.is_new
        yield opened.study


def database(study: optuna.Study) -> optuna.storages.RDBStorage:
    """The storage itself, where Optuna has put a cache before it."""
    found: Any = study._storage
    found = getattr(found, "_backend", found)
    assert isinstance(found, optuna.storages.RDBStorage)
    return found


def states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.get_trials()]


def asked(study: optuna.Study) -> optuna.Trial:
    with warnings.catch_warnings():  # a trial that is asked for sends no heartbeat: it stands for one that was killed
        warnings.filterwarnings("ignore", "Heartbeat of storage")
        return study.ask({"x": IntDistribution(0, 9)})


def begun(study: optuna.Study, x: int, *, ago_s: float = 0.0) -> optuna.Trial:
    """A trial that runs with a parameter, and began a while ago."""
    study.enqueue_trial({"x": x})
    trial = asked(study)
    engine = database(study).engine
    with engine.begin() as connection:
        then = datetime.now() - timedelta(seconds=ago_s)
        told = {"then": then.isoformat(" "), "id": trial._trial_id}
        connection.execute(text("UPDATE trials SET datetime_start = :then WHERE trial_id = :id"), told)
    return trial


def test_only_memory_and_files_are_of_one_machine() -> None:
    assert all(map(is_of_one_machine, (None, "sqlite:///a.db", "journal://a.log", optuna.storages.InMemoryStorage())))
    assert not any(map(is_of_one_machine, ("postgresql://u@h/d", "mysql://u@h/d", "grpc://h:1")))


def test_a_study_is_found_again_with_its_directions(tmp_path: Path) -> None:
    for is_new in (True, False):
        with open_study(storage_url(tmp_path), "s", OBJECTIVES) as opened:
            assert opened.is_new == is_new
            assert [direction.name for direction in opened.study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_a_shared_file_is_told_to_wait_and_one_process_writes_at_a_time(shared: optuna.Study, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "study.db", timeout=0)
    engine = database(shared).engine
    with engine.begin() as connection:
        told = [connection.execute(text(f"PRAGMA {name}")).scalar() for name in ("journal_mode", "synchronous")]
        assert told == ["wal", 1]
        assert connection.execute(text("PRAGMA busy_timeout")).scalar() == 1000 * GRACE_S
        with pytest.raises(sqlite3.OperationalError, match="locked"):  # though nothing was written yet
            other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()


def test_a_trial_of_a_shared_study_sends_heartbeats(shared: optuna.Study) -> None:
    def beats(trial: optuna.Trial) -> tuple[float, float]:
        until = time.monotonic() + 5
        while time.monotonic() < until:
            with database(shared).engine.begin() as connection:
                if connection.execute(text("SELECT COUNT(*) FROM trial_heartbeats")).scalar():
                    return 1.0, 1.0
            time.sleep(0.01)
        return 0.0, 0.0

    shared.optimize(beats, n_trials=1)
    assert shared.trials[0].values == [1.0, 1.0]
    assert (database(shared).get_heartbeat_interval(), database(shared).grace_period) == (BEAT_S, GRACE_S)


def test_what_never_sent_a_heartbeat_is_given_to_another_after_a_while(shared: optuna.Study) -> None:
    begun(shared, 1)
    begun(shared, 2, ago_s=1.5 * GRACE_S)
    alive = begun(shared, 3, ago_s=3 * GRACE_S)
    database(shared).record_heartbeat(alive._trial_id)
    begun(shared, 4, ago_s=3 * GRACE_S)
    fail_stale(shared)
    fail_stale(shared)
    assert states(shared) == ["RUNNING", "RUNNING", "RUNNING", "FAIL", "WAITING"]
    again = asked(shared)
    assert again.params == {"x": 4} and shared.trials[4].system_attrs["failed_trial"] == 3


def test_what_ran_in_processes_that_were_killed_is_asked_for_again(shared: optuna.Study, tmp_path: Path) -> None:
    shared.tell(begun(shared, 1), [1.0, 1.0])
    begun(shared, 2)
    with open_study(storage_url(tmp_path), "s", OBJECTIVES) as opened:
        study = opened.study
        retry_running(study)
        retry_running(study)  # a process that was killed right after this
        assert states(study) == ["COMPLETE", "FAIL", "WAITING"]
        assert asked(study).params == {"x": 2}


def test_a_trial_is_repeated_so_often_and_no_more() -> None:
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.enqueue_trial({"x": 5})
    for _ in range(MOST_RETRIES + 1):
        assert asked(study).params == {"x": 5}
        study.tell(study.trials[-1].number, state=TrialState.FAIL)
        retry_failed(study)
        retry_failed(study)
    assert states(study) == ["FAIL"] * (MOST_RETRIES + 1)
