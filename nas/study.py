"""Where a study is kept: in memory, in a file of this machine, or on a server that several machines share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import DateTime, bindparam, event, text
from sqlalchemy.exc import SQLAlchemyError

from nas.costs import Objective
from nas.working_copy import WorkingCopy

JOURNAL, PROXY = "journal://", "grpc://"
BEAT_S, GRACE_S = 2, 15  # seconds between heartbeats, and without one until a process counts as dead
MOST_RETRIES = 3  # of a trial whose processes were killed


def storage_url(folder: Path) -> str:
    """SQLite in a run directory."""
    return f"sqlite:///{folder / 'study.db'}"


Storage = str | optuna.storages.BaseStorage | None


@dataclass(frozen=True)
class Opened:
    """A study, and whether this process made it."""

    study: optuna.Study
    is_new: bool


def is_of_one_machine(storage: Storage) -> bool:
    """Whether nobody on another machine can be at work in a storage: memory or a file."""
    return not isinstance(storage, str) or storage.startswith(("sqlite:", JOURNAL))


@contextmanager
def open_study(
    storage: Storage, name: str, objectives: Sequence[Objective], *, shared: bool = False
) -> Iterator[Opened]:
    """The study of this name in a storage, made where it does not exist; connections are closed at the end.

    Args:
        storage: any database URL that Optuna takes, `journal://FILE` for its append-only file, `grpc://HOST:PORT` for
            a proxy of Optuna, a storage object, or None for memory.
        shared: several processes work in it: those that run a trial in a database send a heartbeat, and a trial that
            is without one for `GRACE_S` is taken up by another. A file that is not shared is read once, and each trial
            is written to it when it ends.

    Raises ValueError for a storage that cannot be opened.
    """
    held: optuna.storages.BaseStorage | None = None
    try:
        if isinstance(storage, str):
            shared = shared or not is_of_one_machine(storage)
            storage = held = _storage(storage, shared)
        opened = _made(storage, name, objectives)
        if held is not None and not shared:
            copy = WorkingCopy(held, opened.study._study_id)
            opened = Opened(optuna.load_study(storage=copy, study_name=name), opened.is_new)
    except (SQLAlchemyError, ImportError, OSError, optuna.exceptions.OptunaError) as error:
        raise ValueError(
            f"cannot open the study storage: {str(error).splitlines()[0]}; expected a server that answers, "
            "or a file that can be written, under a URL such as sqlite:///study.db or postgresql://USER@HOST/DATABASE, "
            f"{JOURNAL}FILE or {PROXY}HOST:PORT"
        ) from None
    try:
        yield opened
    finally:
        if isinstance(held, optuna.storages.RDBStorage):
            held.remove_session()
            held.engine.dispose()
        elif isinstance(held, optuna.storages.GrpcStorageProxy):
            held.close()


def _made(storage: optuna.storages.BaseStorage | None, name: str, objectives: Sequence[Objective]) -> Opened:
    directions = [objective.direction for objective in objectives]
    try:
        return Opened(optuna.create_study(storage=storage, study_name=name, directions=directions), True)
    except optuna.exceptions.DuplicatedStudyError:
        assert storage is not None
        return Opened(optuna.load_study(storage=storage, study_name=name), False)


def retry_running(study: optuna.Study) -> None:
    """Give the trials that run to whoever asks next: those of processes that were killed, where no other works."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    retry_failed(study)


def retry_failed(study: optuna.Study) -> None:
    """Give the trials that failed, and that no trial repeats, to whoever asks next."""
    trials = study.get_trials()
    repeated = {number for trial in trials for number in trial.system_attrs.get("retry_history", ())}
    for trial in trials:
        if trial.state == TrialState.FAIL and trial.number not in repeated:
            _retry()(study, trial)


def fail_stale(study: optuna.Study) -> None:
    """Likewise for those whose processes send no heartbeat any longer, where the storage knows heartbeats."""
    # Optuna wraps a database in a cache, which knows no heartbeats of its own
    storage = getattr(study._storage, "_backend", study._storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    if not isinstance(storage, optuna.storages.RDBStorage) or storage.get_heartbeat_interval() is None:
        return
    for trial_id in _never_beaten(storage, study._study_id):
        with suppress(optuna.exceptions.UpdateFinishedTrialError):  # another process was faster
            if storage.set_trial_state_values(trial_id, state=TrialState.FAIL):
                _retry()(study, storage.get_trial(trial_id))


def _never_beaten(storage: optuna.storages.RDBStorage, study_id: int) -> list[int]:
    """Trials whose processes were killed before the first heartbeat, which Optuna takes to be running for ever."""
    then = datetime.now() - timedelta(seconds=2 * GRACE_S)  # Optuna's clock has no zone
    query = text(
        "SELECT t.trial_id FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
        "WHERE t.study_id = :study AND t.state = 'RUNNING' AND h.trial_id IS NULL AND t.datetime_start < :then"
    ).bindparams(bindparam("then", type_=DateTime))
    with storage.engine.begin() as connection:
        return [int(row[0]) for row in connection.execute(query, {"study": study_id, "then": then})]


def _retry() -> Callable[[optuna.Study, FrozenTrial], None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=MOST_RETRIES)


def _storage(url: str, shared: bool) -> optuna.storages.BaseStorage:
    if url.startswith(JOURNAL):
        return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix(JOURNAL)))
    if url.startswith(PROXY):
        host, _, port = url.removeprefix(PROXY).partition(":")
        return _proxy(host, int(port) if port.isdecimal() else 13000)
    beats: dict[str, Any] = {}
    if shared:
        beats = {"heartbeat_interval": BEAT_S, "grace_period": GRACE_S, "heartbeat_stale_trial_callback": _retry()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        database = optuna.storages.RDBStorage(url, **beats)
    if database.engine.name == "sqlite":
        event.listen(database.engine, "connect", _write_ahead)
        if shared:
            event.listen(database.engine, "begin", _begin_immediate)
        database.engine.dispose()
    return database


def _proxy(host: str, port: int) -> optuna.storages.BaseStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        proxy = optuna.storages.GrpcStorageProxy(host=host, port=port)
    proxy.wait_server_ready(timeout=10)
    return proxy


def _write_ahead(connection: Any, record: object) -> None:
    """One fsync a suggested choice makes SQLite 20 times slower; a write-ahead log survives a killed process."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.execute(f"PRAGMA busy_timeout={1000 * GRACE_S}")
    cursor.close()


def _begin_immediate(connection: Any) -> None:
    """Without it two processes may read that a trial waits before either writes that it has taken it."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")
