"""Scores: whole or in stages, by another way to the same numbers; kept, and never taken for those of something else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hardware_profiles.machine import int8_weight_limit
from nas import evaluator as module
from nas.evaluate import accuracy, calibration_images, calibration_order
from nas.evaluator import Accuracies, Evaluator, Score, stages
from nas.quantize import Quantized
from nas.supernet import Subnet
from tests.nas import tiny

ARCHITECTURE = tiny.space().largest


def test_a_score_on_all_images_is_the_accuracy_of_what_is_deployed() -> None:
    evaluator = Evaluator(tiny.supernet(), tiny.data())
    whole = evaluator.score(ARCHITECTURE, "val_front")
    assert whole.is_whole and whole.at_most == whole.accuracy
    assert whole.accuracy == evaluator.accuracy(ARCHITECTURE, "val_front")
    assert whole.accuracy == accuracy(evaluator.deploy(ARCHITECTURE).simulated, tiny.data(), "val_front")


def test_norms_are_set_by_as_many_images_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def counted(subnet: Subnet, images: list[torch.Tensor]) -> Subnet:
        batches.extend(map(len, images))
        return subnet

    monkeypatch.setattr("nas.evaluator.recalibrate", counted)
    for calibration in (40, 64, 1000):  # of 64 images
        batches.clear()
        Evaluator(tiny.supernet(), tiny.data(), calibration=calibration).deploy(ARCHITECTURE)
        assert sum(batches) == min(calibration, 64)


def same(first: Quantized, second: Quantized) -> bool:
    """Weights and statistics to the last bit, and ranges."""
    pairs = zip((first.folded, first.simulated), (second.folded, second.simulated), strict=True)
    states = [(a.state_dict(), b.state_dict()) for a, b in pairs]
    return first.ranges == second.ranges and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in states
    )


def test_precisions_of_one_architecture_are_calibrated_once_and_as_if_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    space, rng = tiny.space(), np.random.default_rng(5)
    asked: list[int] = []
    monkeypatch.setattr(module, "calibration_images", lambda *given: asked.append(1) or calibration_images(*given))
    evaluator = Evaluator(tiny.supernet(), tiny.data())
    mixed = space.sample(rng)
    variants = [mixed, *(space.with_precision(mixed, name) for name in ("int8", "fp32")), mixed]
    found = [evaluator.deploy(each) for each in variants]
    assert len(asked) == 1 and len(set(variants)) == 3
    other = space.smallest if space.undeployed(mixed) != space.undeployed(space.smallest) else space.largest
    evaluator.deploy(other)
    assert len(asked) == 2
    for architecture, deployed in zip(variants, found, strict=True):
        assert same(deployed, Evaluator(tiny.supernet(), tiny.data()).deploy(architecture))


def test_ranges_are_seen_when_the_first_precision_that_needs_them_comes() -> None:
    space = tiny.space()
    floats, int8 = (space.with_precision(ARCHITECTURE, name) for name in ("fp32", "int8"))
    evaluator = Evaluator(tiny.supernet(), tiny.data())
    assert evaluator.deploy(floats).ranges == {}
    assert same(evaluator.deploy(int8), Evaluator(tiny.supernet(), tiny.data()).deploy(int8))


def test_calibrations_used_longest_ago_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED", 2)
    space, asked = tiny.space(), []
    monkeypatch.setattr(module, "calibration_images", lambda *given: asked.append(1) or calibration_images(*given))
    evaluator = Evaluator(tiny.supernet(), tiny.data())
    drawn = {space.undeployed(space.sample(np.random.default_rng(i))) for i in range(20)}
    first, second, third = sorted(drawn, key=str)[:3]
    for architecture in (first, second, first, third, first):
        evaluator.deploy(architecture)
    assert len(asked) == 3
    evaluator.deploy(second)
    assert len(asked) == 4


def test_stages_are_counted_together() -> None:
    data = tiny.data(3000)
    asked: list[Score] = []
    evaluator = Evaluator(tiny.supernet(), data)

    def never(score: Score) -> bool:
        asked.append(score)
        return False

    whole = evaluator.score(ARCHITECTURE, "val_search", never)
    subnet = evaluator.deploy(ARCHITECTURE).simulated
    with torch.no_grad():
        hits = [bool(hit) for x, y in data.batches("val_search", 8) for hit in subnet(x).argmax(1) == y]
    right = np.array(hits)[calibration_order(data["val_search"])]
    assert [score.correct for score in asked] == [sum(right[: score.seen]) for score in asked] and len(asked) > 2
    assert whole == asked[-1] and whole.accuracy == accuracy(subnet, data, "val_search") == sum(right) / len(right)


def test_stages_end_with_all_images_and_begin_with_enough() -> None:
    assert stages(1000) == [125, 250, 500, 1000]
    assert stages(300) == [75, 150, 300]
    assert stages(48) == [48] and stages(1) == [1]


def test_an_evaluation_stops_where_it_is_told_and_goes_on_from_there(tmp_path: Path) -> None:
    data, path = tiny.data(3000), tmp_path / "accuracies.jsonl"
    asked: list[Score] = []

    def after_two(score: Score) -> bool:
        asked.append(score)
        return len(asked) == 2

    stopped = Evaluator(tiny.supernet(), data, results=path).score(ARCHITECTURE, "val_search", after_two)
    images = len(data["val_search"])
    assert [score.seen for score in asked] == stages(images)[:2] and stopped == asked[1] and not stopped.is_whole
    again = Evaluator(tiny.supernet(), data, results=path)
    again.deploy = lambda architecture: pytest.fail("was kept")  # type: ignore[method-assign]
    assert again.score(ARCHITECTURE, "val_search", lambda score: score.seen == stopped.seen) == stopped
    whole = Evaluator(tiny.supernet(), data, results=path).score(ARCHITECTURE, "val_search")
    assert whole == Evaluator(tiny.supernet(), data).score(ARCHITECTURE, "val_search")
    # what is kept of all images tells what it was after each stage: a search finds the same with and without it
    asked.clear()
    assert again.score(ARCHITECTURE, "val_search", after_two) == stopped
    assert again.score(ARCHITECTURE, "val_search") == whole


def test_what_is_kept_is_of_weights_data_machine_and_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "accuracies.jsonl"
    Evaluator(tiny.supernet(), tiny.data(), results=path).accuracy(ARCHITECTURE, "val_search")
    for other in (
        Evaluator(tiny.supernet(1), tiny.data(), results=path),
        Evaluator(tiny.supernet(), tiny.data(120), results=path),
    ):
        assert other._results.get(ARCHITECTURE, "val_search") == ()
    with monkeypatch.context() as other_machine:
        other_machine.setattr("nas.evaluator.int8_weight_limit", lambda: 64 if int8_weight_limit() != 64 else 127)
        other = Evaluator(tiny.supernet(), tiny.data(), results=path)
    assert other._results.get(ARCHITECTURE, "val_search") == ()
    held = Evaluator(tiny.supernet(), tiny.data(), results=path)._results
    assert held.get(ARCHITECTURE, "val_search") != () == held.get(ARCHITECTURE, "val_front")
    assert held.get(tiny.space().smallest, "val_search") == ()


def test_lines_that_were_cut_off_or_are_foreign_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "accuracies.jsonl"
    writer, reader = Accuracies(path, "key"), Accuracies(path, "key")
    writer.put(ARCHITECTURE, "val_search", (3, 5))
    with path.open("a") as file:
        file.write('{"key": "key", "archi\n[1, 2]\nnonsense\n' + json.dumps({"key": "key", "architecture": 1}) + "\n")
    writer.put(tiny.space().smallest, "val_search", (1,))
    with path.open("a") as file:
        file.write('{"key": "key", "architecture"')  # being written
    assert reader.get(ARCHITECTURE, "val_search") == (3, 5)
    assert reader.get(tiny.space().smallest, "val_search") == (1,)
    with path.open("a") as file:
        file.write(f': "{ARCHITECTURE.id}", "split": "val_front", "correct": [9]}}\n')
    writer.put(ARCHITECTURE, "val_search", (3,))  # of a process that stopped earlier and was slower
    assert reader.get(ARCHITECTURE, "val_search") == (3, 5)
    assert reader.get(ARCHITECTURE, "val_front") == (9,)


def test_accuracy_of_all_images_is_seldom_beyond_what_a_part_leaves() -> None:
    """Drawn without replacement from known images, many times."""
    rng = np.random.default_rng(0)
    beyond = narrow = 0
    for share in (0.1, 0.5, 0.9):
        right = np.arange(1000) < 1000 * share
        for _ in range(1000):
            for seen in (100, 250, 500):
                score = Score(int(rng.permutation(right)[:seen].sum()), seen, 1000)
                beyond += score.at_most < share
                narrow += score.at_most < share + 0.2
    assert beyond < 9000 * 0.004  # three standard errors, one side
    assert narrow > 9000 * 0.95


@pytest.mark.parametrize(
    ("correct", "seen", "images"), [(0, 64, 512), (40, 64, 65), (450, 500, 10_000), (128, 128, 256)]
)
def test_what_a_part_leaves_is_where_it_would_be_three_standard_errors_away(
    correct: int, seen: int, images: int
) -> None:
    """Wilson's interval ends at a share whose own standard error, without replacement, is a third of the distance."""
    score = Score(correct, seen, images)
    share, found = correct / seen, score.at_most
    assert share <= found <= 1
    squared_error = found * (1 - found) / seen * (images - seen) / (images - 1)
    assert (found - share) ** 2 == pytest.approx(9 * squared_error, rel=1e-9)
