"""Scores: whole or in stages, by another way to the same numbers; kept, and never taken for those of something else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nas.evaluate import accuracy
from nas.evaluator import Accuracies, Evaluator, Score, stages
from tests.nas import tiny

ARCHITECTURE = tiny.space().largest


def test_a_score_on_all_images_is_the_accuracy_of_what_is_deployed() -> None:
    evaluator = Evaluator(tiny.supernet(), tiny.data())
    whole = evaluator.score(ARCHITECTURE, "val_front")
    assert whole.is_whole and whole.at_most == whole.accuracy
    assert whole.accuracy == evaluator.accuracy(ARCHITECTURE, "val_front")
    assert whole.accuracy == accuracy(evaluator.deploy(ARCHITECTURE).simulated, tiny.data(), "val_front")


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


def test_what_is_kept_is_of_weights_data_and_architecture(tmp_path: Path) -> None:
    path = tmp_path / "accuracies.jsonl"
    Evaluator(tiny.supernet(), tiny.data(), results=path).accuracy(ARCHITECTURE, "val_search")
    for other in (
        Evaluator(tiny.supernet(1), tiny.data(), results=path),
        Evaluator(tiny.supernet(), tiny.data(120), results=path),
    ):
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
