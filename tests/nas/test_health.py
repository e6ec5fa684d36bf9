"""The guard over training: what it measures, what it takes for a collapse, and how training recovers."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.checkpoints import load_checkpoint
from nas.health import Guard, examine, sizes_of
from nas.interpreter import Normalization
from nas.strategies import Pass, Step, Strategy
from nas.supernet import Supernet
from nas.train import RETRIES, TrainingDiverged, train
from nas.train_settings import TrainSettings
from tests.nas.training import (
    QUICK,
    SPACES,
    Killed,
    assert_equal,
    assert_same_runs,
    corners,
    kill_at,
    metrics,
    timeless,
)  # fmt: skip

module = importlib.import_module("nas.train")
step_module = importlib.import_module("nas.train_step")

SPACE = SPACES["coupled"]
DATA = corners()
EPOCH = len(DATA["train"]) // 24
SETTINGS = replace(QUICK, steps=4 * EPOCH)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# the guard -----------------------------------------------------------------------------------------------

ALL = ("smallest", "middle", "largest")


def judged(guard: Guard, *accuracies: float, watched: tuple[str, ...] = ("largest",)) -> list[str]:
    return [guard.collapse(dict.fromkeys(ALL, value), watched) for value in accuracies]


def test_a_collapse_is_a_stretch_at_chance_after_learning() -> None:
    """Chance 0.25, 300 images: a standard error of 0.025, so 0.325 has learned, and up to 0.275 is chance."""
    guard = Guard(0.25, 300, 3)
    assert judged(guard, 0.25, 0.2, 0.32, 0.25, 0.1) == [""] * 5  # it never was better
    assert judged(guard, 0.33, 0.25, 0.27) == [""] * 3 and not guard.healthy
    assert judged(guard, 0.3) == [""] and guard.healthy  # between the two: neither good nor at chance
    found = judged(guard, 0.25, 0.1, 0.27, 0.26)
    assert found == ["", "", *(f"the largest subnet has been at chance for {n} evaluations" for n in (3, 4))]
    assert judged(guard, 0.9) == [""] and guard.healthy


def test_patience_and_the_number_of_images() -> None:
    impatient = Guard(0.25, 300, 1)
    assert [bool(found) for found in judged(impatient, 0.5, 0.25, 0.5, 0.25)] == [False, True, False, True]
    few = Guard(0.25, 12, 1)  # a standard error of 0.125: 0.6 says nothing yet
    assert not any(judged(few, 0.6, 0.25))
    assert judged(few, 0.7, 0.37)[1] and not judged(few, 0.7, 0.38)[1]


def test_only_what_is_watched_can_collapse() -> None:
    guard = Guard(0.25, 300, 1)
    assert not any(judged(guard, 0.9, 0.25, watched=()))
    assert judged(guard, 0.9, watched=ALL) == [""]
    assert not any(judged(guard, 0.25, watched=())) and guard.healthy
    (found,) = judged(guard, 0.25, watched=("smallest", "largest"))
    assert found.count(" and ") == 1 and "the smallest subnet" in found and "the largest subnet" in found


def test_the_state_of_a_guard_survives_json() -> None:
    guard = Guard(0.25, 300, 3)
    judged(guard, 0.9, 0.2, watched=("smallest", "largest"))
    again = Guard(0.25, 300, 3)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.state() == guard.state() and not again.healthy
    assert judged(again, 0.2, 0.2) == judged(guard, 0.2, 0.2) != ["", ""]
    fresh = Guard(0.25, 300, 3)
    again.restore(fresh.state())
    assert not any(judged(again, *[0.2] * 5))


def test_chance_is_the_share_of_the_most_frequent_class() -> None:
    labels = DATA["val_search"].labels
    guard = Guard.of(DATA, 2)
    chance, count = max(np.bincount(labels.numpy())) / len(labels), len(labels)
    error = math.sqrt(chance * (1 - chance) / count)
    for accuracy, learned in ((chance + 2.9 * error, False), (chance + 3.1 * error, True)):
        judged(guard, accuracy)
        assert bool(guard.state()["learned"]) == learned


# what is measured ----------------------------------------------------------------------------------------


def test_sizes() -> None:
    depths = {name: architecture["stage1.depth"] for name, architecture in sizes_of(SPACE).items()}
    assert depths == {"smallest": 1, "middle": 2, "largest": 3}


@pytest.mark.parametrize("kind", ["elastic", "transformer"])
@pytest.mark.parametrize("training", [True, False])
def test_examining_measures_gradients_and_accuracies_and_changes_nothing(kind: str, training: bool) -> None:
    supernet = Supernet(SPACES[kind], seed=3).train(training)
    if kind == "elastic":
        train(supernet, DATA, settings=replace(QUICK, steps=5))
    supernet.train(training)
    before = supernet.digest()
    found = examine(supernet, DATA)
    assert supernet.digest() == before and supernet.training == training
    assert all(p.grad is None for p in supernet.parameters()) or kind == "elastic"
    split = DATA["calibration"]
    order = np.random.default_rng(0).permutation(len(split))[:64]
    pixels, labels = next(split.at([order]))
    tested, answers = next(DATA["val_search"].batches(1000))
    every = next(split.at([np.random.default_rng(0).permutation(len(split))]))[0]
    for name, architecture in sizes_of(supernet.space).items():
        plain = Supernet(supernet.space, seed=3)
        plain.load_state_dict(supernet.state_dict())
        plain.train()
        side = int(architecture["resolution"])
        logits = plain(DATA.prepare(pixels, side), architecture)
        (-torch.log_softmax(logits, 1)[torch.arange(64), labels].mean()).backward()
        squares = sum(float(p.grad.double().square().sum()) for p in plain.parameters() if p.grad is not None)
        assert found[f"{name}_gradient_norm"] == pytest.approx(math.sqrt(squares), rel=1e-4)
        with torch.no_grad():  # every statistic that of all calibration images at once: momentum 1
            subnet = plain.extract(architecture)
            subnet.run(DATA.prepare(every, side), Normalization(True, momentum=1.0))
            right = subnet.eval()(DATA.prepare(tested, side)).argmax(1) == answers
        assert found[name] == pytest.approx(float(right.float().mean()), abs=1e-6)


# recovering ----------------------------------------------------------------------------------------------


class Poisoned:
    """A strategy of one's own: the largest network, and at one step, the first so many times, a weight of nan."""

    def __init__(self, step: int, times: int) -> None:
        self.at, self.times = step, times

    def step(self, number: int) -> Step:
        weight = 1.0
        if number == self.at and self.times:
            self.times -= 1
            weight = math.nan
        return Step((Pass((SPACE.largest,), weight=weight), Pass((SPACE.smallest,))), 0.7)


def run(strategy: Strategy, folder: Path | None, settings: TrainSettings = SETTINGS) -> tuple[Supernet, dict[str, Any]]:
    supernet = Supernet(SPACE, seed=5)
    return supernet, timeless(train(supernet, DATA, folder=folder, settings=settings, strategy=strategy))


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float, int]]:
    """(step, learning rate, attempt) of every step, as the optimizer sees them."""
    found: list[tuple[int, float, int]] = []
    real = step_module.StepRunner.gradients
    optimizers: list[torch.optim.Optimizer] = []
    made = module._optimizer

    def optimizer(*arguments: Any) -> torch.optim.Optimizer:
        optimizers.append(made(*arguments))
        return optimizers[-1]

    def gradients(held: Any, plan: Step, number: int, steps: int, attempt: int, batches: Any) -> float:
        (rate,) = {group["lr"] for group in optimizers[-1].param_groups}
        found.append((number, rate, attempt))
        loss: float = real(held, plan, number, steps, attempt, batches)
        return loss

    monkeypatch.setattr(module, "_optimizer", optimizer)
    monkeypatch.setattr(step_module.StepRunner, "gradients", gradients)
    return found


def test_a_planted_nan_is_rolled_back(
    tmp_path: Path, rates: list[tuple[int, float, int]], caplog: pytest.LogCaptureFixture
) -> None:
    at = 2 * EPOCH + 2
    supernet, results = run(Poisoned(at, 1), tmp_path)
    assert results["rollbacks"] == 1 and all(math.isfinite(value) for value in results.values())
    assert all(tensor.isfinite().all() for tensor in supernet.state_dict().values())
    assert results["largest"] > 0.4
    assert [number for number, *_ in rates] == [*range(at + 1), *range(2 * EPOCH, 4 * EPOCH)]
    assert {rate for _, rate, _ in rates[: at + 1]} == {SETTINGS.learning_rate * 0.7}
    assert {rate for _, rate, _ in rates[at + 1 :]} == {SETTINGS.learning_rate * 0.7 / 2}
    assert {attempt for *_, attempt in rates[: at + 1]} == {0} and {attempt for *_, attempt in rates[at + 1 :]} == {1}
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == [EPOCH, 2 * EPOCH, 2 * EPOCH, 3 * EPOCH, 4 * EPOCH]
    assert lines[2] == {
        "step": 2 * EPOCH,
        "event": "rollback",
        "reason": f"the loss became nan at step {at}",
        "learning_rate": SETTINGS.learning_rate / 2,
    }
    assert [line["rollbacks"] for line in lines if "epoch" in line] == [0, 0, 1, 1]
    assert f"loss became nan at step {at}: going back to step {2 * EPOCH} with a learning rate of 0.05" in caplog.text
    # what was lost was spent, too
    one = 24 * 3 * (SPACE.lower(SPACE.largest).macs + SPACE.lower(SPACE.smallest).macs)
    assert results["macs"] == one * len(rates)


def test_a_planted_nan_without_a_folder() -> None:
    supernet, results = run(Poisoned(EPOCH + 1, 1), None)
    assert results["rollbacks"] == 1 and results["largest"] > 0.4
    supernet, results = run(Poisoned(1, 1), None)  # before anything was evaluated: from the beginning
    assert results["rollbacks"] == 1 and all(tensor.isfinite().all() for tensor in supernet.state_dict().values())


def test_recovering_gives_the_same_weights_with_and_without_a_folder(tmp_path: Path) -> None:
    kept, results = run(Poisoned(EPOCH + 1, 1), tmp_path)
    other, found = run(Poisoned(EPOCH + 1, 1), None)
    assert_equal(kept, other)
    assert results == found


def test_the_beginning_is_a_state_to_go_back_to(tmp_path: Path) -> None:
    """The rolled-back run differs from an untroubled one in its learning rate alone (nothing is augmented)."""
    recovered, _ = run(Poisoned(2, 1), tmp_path)
    clean, _ = run(Poisoned(-1, 0), None, replace(SETTINGS, learning_rate=SETTINGS.learning_rate / 2))
    assert_equal(recovered, clean)
    assert metrics(tmp_path)[0]["step"] == 0


def test_arithmetic_that_was_timed_stays_after_going_back_to_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "fastest_arithmetic", lambda *_: "fp32_channels_last")
    used = []
    real = step_module.StepRunner.gradients

    def spy(held: Any, *arguments: Any) -> float:
        used.append(held.arithmetic)
        loss: float = real(held, *arguments)
        return loss

    monkeypatch.setattr(step_module.StepRunner, "gradients", spy)
    run(Poisoned(1, 1), tmp_path, replace(SETTINGS, arithmetic="auto"))
    assert set(used) == {"fp32_channels_last"}
    found = load_checkpoint(tmp_path / "supernet")
    assert found is not None and found[1]["arithmetic"] == "fp32_channels_last"


SHORT = [
    (-1, 2),
    (1, EPOCH + 2),
]  # killed so long after the rollback; poisoned before the first good state, and after it
LONG = [(1, 2), (EPOCH, 2), (-1, EPOCH + 2), (EPOCH, EPOCH + 2)]


@pytest.mark.parametrize(
    ("after", "poisoned"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.slow) for case in LONG)]
)
def test_killed_around_a_rollback_and_resumed(
    poisoned: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed just before the collapse, or after it: the poison comes as it did, or is over."""
    monkeypatch.setattr(module, "CHECKPOINT_SECONDS", -1.0)
    whole, results = run(Poisoned(poisoned, 1), tmp_path / "whole")
    with monkeypatch.context() as patched, pytest.raises(Killed):
        strategy = Poisoned(poisoned, 1)
        if after < 0:
            kill_at(patched, poisoned + after)
            run(strategy, tmp_path / "killed")
        else:  # the step comes twice; only the second time counts
            real = step_module.StepRunner.gradients

            def until(held: Any, plan: Any, number: int, steps: int, attempt: int, *rest: Any) -> float:
                if attempt and number == poisoned + after:
                    raise Killed
                loss: float = real(held, plan, number, steps, attempt, *rest)
                return loss

            patched.setattr(step_module.StepRunner, "gradients", until)
            run(strategy, tmp_path / "killed")
    supernet, found = run(Poisoned(poisoned, 1 if after < 0 else 0), tmp_path / "killed")
    assert_equal(supernet, whole)
    assert found == results
    assert_same_runs([tmp_path / "whole", tmp_path / "killed"])


def test_poison_that_always_comes_back_ends_the_training(tmp_path: Path, rates: list[tuple[int, float, int]]) -> None:
    at = EPOCH + 1
    with pytest.raises(TrainingDiverged) as raised:
        run(Poisoned(at, 10**6), tmp_path)
    text = str(raised.value)
    assert text.startswith(
        f"the loss became nan at step {at} of {4 * EPOCH} after 3 attempts with lower learning rates"
    )
    assert f"the last good checkpoint stays in {tmp_path / 'supernet' / 'good'}" in text
    assert "lower train.learning_rate (now 0.1) or raise train.warmup (now 0.1)" in text
    assert [number for number, *_ in rates] == [*range(at + 1), *(EPOCH, at) * 3] and RETRIES == 3
    peaks = [rate for number, rate, _ in rates if number == at]
    np.testing.assert_allclose(peaks, 0.07 * 0.5 ** np.arange(4))
    for where in ("supernet/good", "supernet"):
        found = load_checkpoint(tmp_path / where)
        assert found is not None and found[1]["step"] == EPOCH
        assert all(tensor.isfinite().all() for tensor in found[0].values())
    lines = metrics(tmp_path)
    assert [line.get("event", "evaluated") for line in lines] == ["evaluated", *["rollback"] * 3]
    with pytest.raises(TrainingDiverged) as raised:
        run(Poisoned(1, 10**6), None)
    assert "after 3 attempts" in str(raised.value) and "checkpoint" not in str(raised.value)


def collapsing(monkeypatch: pytest.MonkeyPatch, chance_at: Mapping[int, int]) -> list[int]:
    """Evaluations that find the middle subnet at chance: at each of these steps so many times."""
    left, seen = dict(chance_at), list[int]()
    real, trainers = module.examine, list[Any]()
    record = module._Trainer._end_epoch

    def end_epoch(trainer: Any, *arguments: Any) -> None:
        trainers.append(trainer)
        record(trainer, *arguments)

    def fake(supernet: Supernet, data: Any) -> dict[str, float]:
        step = trainers[-1].step
        seen.append(step)
        found: dict[str, float] = real(supernet, data) | dict.fromkeys(ALL, 0.9)
        if left.get(step, 0):
            left[step] -= 1
            found["middle"] = 0.25
        return found

    monkeypatch.setattr(module._Trainer, "_end_epoch", end_epoch)
    monkeypatch.setattr(module, "examine", fake)
    return seen


def test_a_collapse_to_chance_goes_back_to_the_last_good_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, steps=6 * EPOCH, patience=2)
    seen = collapsing(monkeypatch, {3 * EPOCH: 1, 4 * EPOCH: 1})
    _, results = run(Poisoned(-1, 0), tmp_path, settings)
    assert seen == [EPOCH * n for n in (1, 2, 3, 4, 3, 4, 5, 6)]  # from the second on, not from the third
    assert results["rollbacks"] == 1
    lines = metrics(tmp_path)
    assert [line["step"] // EPOCH for line in lines] == [1, 2, 2, 3, 4, 5, 6]
    expected = f"the middle subnet has been at chance for 2 evaluations at step {4 * EPOCH}"
    assert lines[2]["event"] == "rollback" and lines[2]["reason"] == expected
    assert json.loads(json.dumps(results)) == results


def test_one_bad_evaluation_is_no_collapse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collapsing(monkeypatch, {2 * EPOCH: 1, 4 * EPOCH: 1})
    settings = replace(SETTINGS, steps=5 * EPOCH, patience=2)
    assert run(Poisoned(-1, 0), tmp_path, settings)[1]["rollbacks"] == 0
    found = load_checkpoint(tmp_path / "supernet" / "good")
    assert found is not None and found[1]["step"] == 5 * EPOCH


def test_killed_while_at_chance_the_guard_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SETTINGS, patience=2)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        collapsing(patched, {2 * EPOCH: 1})
        kill_at(patched, 2 * EPOCH + 1)
        run(Poisoned(-1, 0), tmp_path, settings)
    seen = collapsing(monkeypatch, {3 * EPOCH: 1})
    _, results = run(Poisoned(-1, 0), tmp_path, settings)
    assert seen == [EPOCH * n for n in (3, 2, 3, 4)] and results["rollbacks"] == 1  # the first was good


def test_collapses_to_chance_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collapsing(monkeypatch, {2 * EPOCH: 9, 3 * EPOCH: 9})
    with pytest.raises(
        TrainingDiverged, match=r"middle subnet has been at chance for 2 evaluations .* after 3 attempts"
    ):
        run(Poisoned(-1, 0), tmp_path, replace(SETTINGS, patience=2))
    found = load_checkpoint(tmp_path / "supernet" / "good")
    assert found is not None and found[1]["step"] == EPOCH


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step of an epoch spoils them, once: the loss before it was fine."""
    real, spoilt = module._Trainer._train_step, list[int]()

    def spoil(trainer: Any, batches: Any) -> float:
        loss: float = real(trainer, batches)
        if trainer.step == 2 * EPOCH - 1 and not spoilt:
            spoilt.append(trainer.step)
            with torch.no_grad():
                next(trainer.supernet.parameters()).view(-1)[0] = math.nan
        return loss

    monkeypatch.setattr(module._Trainer, "_train_step", spoil)
    _, results = run(Poisoned(-1, 0), tmp_path)
    assert results["rollbacks"] == 1
    lines = metrics(tmp_path)
    assert [line["step"] // EPOCH for line in lines] == [1, 1, 2, 3, 4]
    assert "is not finite" in lines[1]["reason"]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_network_that_never_learns_is_told() -> None:
    guard = Guard(0.1, 1000, patience=2)
    seen = {"smallest": 0.1, "largest": 0.5}
    assert not guard.collapse(seen, ("largest",)) and guard.stuck == []
    for expected in ([], ["smallest"], ["smallest"]):
        assert not guard.collapse(seen, ("smallest", "largest"))
        assert guard.stuck == expected
    again = Guard(0.1, 1000, patience=2)
    again.restore(json.loads(json.dumps(guard.state())))
    assert again.stuck == ["smallest"]
    guard.collapse({"smallest": 0.3, "largest": 0.5}, ("smallest", "largest"))
    assert guard.stuck == []


def test_a_gradient_that_is_not_finite_is_a_collapse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, calls = module.examine, []

    def spoilt(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        return real(*arguments) | ({"middle_gradient_norm": math.inf} if len(calls) == 2 else {})

    monkeypatch.setattr(module, "examine", spoilt)
    results = train(Supernet(SPACE, seed=5), DATA, folder=tmp_path, settings=SETTINGS)
    assert results["rollbacks"] == 1 and "the gradient of the middle subnet is not finite at step" in caplog.text
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
