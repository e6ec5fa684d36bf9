"""What networks have in common from the start, against networks made for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import optuna

import nas
from nas.pipeline import Run
from nas.study import storage_url
from tests.nas import tiny


def test_only_layers_from_the_start_that_are_equal_are_shared(
    load_benchmark: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    script, space = load_benchmark("shared_prefixes"), tiny.space()
    small, large = space.lower(space.smallest), space.lower(space.largest)
    assert script.shared_macs(large, large) == large.macs
    int8 = space.lower(space.with_precision(space.largest, "int8"))
    assert script.shared_macs(int8, large) == 0  # the first layer differs in precision
    networks = [small, large, large, small, large]
    between = script.shared_macs(small, large)
    total = 2 * small.macs + 3 * large.macs
    assert script.shared_share(networks, 5) == (between + 2 * large.macs + small.macs) / total
    assert script.shared_share(networks, 2) == (between + between) / total
    assert script.shared_share(networks, 1) == 0


def test_a_run_is_read(load_benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    tiny.write_experiment(tmp_path).rename(folder / "experiment.yaml")
    run = Run.open(folder)
    evaluator = tiny.FakeEvaluator(run.space)
    objectives = [nas.maximize("accuracy"), nas.minimize("macs")]
    tiny_net = type("Net", (), {"space": run.space})()
    nas.search(tiny_net, None, objectives, trials=12, storage=storage_url(folder), evaluator=evaluator)  # type: ignore[arg-type]
    out = tmp_path / "out.json"
    script = load_benchmark("shared_prefixes")
    assert script.main([str(folder), "--group", "4", "--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["architectures"] == 12 and 0 <= told["generation"] <= told["search"] < 1
    front = run.space.undeployed
    tried = [
        trial.user_attrs["architecture"]
        for trial in optuna.load_study(study_name=None, storage=storage_url(folder)).trials
    ]
    assert told["calibrated_before"] == round(1 - len({front(run.space.parse(text)) for text in tried}) / 12, 4)
