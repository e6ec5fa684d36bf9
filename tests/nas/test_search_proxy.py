"""A search in a study behind Optuna's gRPC proxy, which is really run."""

from __future__ import annotations

import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

import nas
from nas.costs import maximize, minimize
from nas.study import open_study, storage_url
from tests.nas import tiny

pytest.importorskip("grpc", reason="grpcio is not installed")

SERVER = """
    import sys, warnings
    import optuna
    warnings.simplefilter("ignore")
    storage = optuna.storages.RDBStorage(sys.argv[1])
    optuna.storages.run_grpc_proxy_server(storage, host="localhost", port=int(sys.argv[2]))
"""


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", textwrap.dedent(SERVER), storage_url(tmp_path), str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield f"grpc://localhost:{port}"
    server.kill()
    server.wait()


class _Net:
    def __init__(self, space: Any) -> None:
        self.space = space


def test_a_search_behind_a_proxy_is_that_in_memory_and_goes_on(proxy: str, tmp_path: Path) -> None:
    objectives = [maximize("accuracy"), minimize("macs")]
    expected = tiny.FakeEvaluator(tiny.space())
    first, again = tiny.FakeEvaluator(tiny.space()), tiny.FakeEvaluator(tiny.space())
    fronts = []
    for evaluator, storage in ((expected, None), (first, proxy), (again, proxy)):
        net: Any = _Net(tiny.space())
        data: Any = None
        settings: dict[str, Any] = {"trials": 16, "population": 4, "storage": storage, "evaluator": evaluator}
        fronts.append(nas.search(net, data, objectives, **settings))
    assert fronts[0] == fronts[1] == fronts[2]
    assert expected.asked == first.asked and again.asked == []
    study = optuna.load_study(study_name=None, storage=storage_url(tmp_path))
    assert len(study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))) == 16


def test_a_proxy_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = optuna.storages.GrpcStorageProxy.wait_server_ready
    monkeypatch.setattr(optuna.storages.GrpcStorageProxy, "wait_server_ready", lambda self, timeout: wait(self, 1))
    with (
        pytest.raises(ValueError, match=r"cannot open the study storage: .*grpc://HOST:PORT"),
        open_study("grpc://localhost:1", "s", [maximize("accuracy")]),
    ):
        pass
