"""Checkpoints that were cut short, damaged or lost."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nas import checkpoints
from nas.checkpoints import CorruptCheckpoint, load_checkpoint, save_checkpoint


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "weights/a": torch.randn(4, 3, generator=generator).t(),  # not contiguous
        "optimizer/a/step": torch.tensor(float(step)),
        "counts": torch.arange(5),
    }


def save(folder: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, step, tensors_of(step), {"step": step, "name": "ü"}) for step in steps]


def assert_holds(folder: Path, step: int) -> None:
    found = load_checkpoint(folder)
    assert found is not None
    tensors, state = found
    assert state == {"step": step, "name": "ü"}
    expected = tensors_of(step)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_nothing_yet(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert load_checkpoint(tmp_path / "none") is None
    tmp_path.joinpath("empty").mkdir()
    assert load_checkpoint(tmp_path / "empty") is None
    save(tmp_path / "new", 1)
    assert not caplog.records


def test_the_newest_of_the_last_two(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 200)
    assert_holds(tmp_path, 200)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["index.json", "step-000000010.safetensors", "step-000000200.safetensors"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


DAMAGES = [cut, empty, flip, Path.unlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    _, newest = save(tmp_path, 1, 2)
    damage(newest)
    with caplog.at_level(logging.WARNING):
        assert_holds(tmp_path, 1)
    assert str(newest) in caplog.text and "falling back" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_all_corrupt(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    for path in save(tmp_path, 1, 2):
        damage(path)
    with pytest.raises(CorruptCheckpoint, match=r"no checkpoint in .* is readable; delete"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("steps", [(3,), (1, 2), (1, 2, 3)])
def test_a_corrupt_checkpoint_is_never_one_of_the_two_kept(tmp_path: Path, steps: tuple[int, ...]) -> None:
    """Training goes on from step 1; whatever it saves next, the file before it is one that can be read."""
    _, corrupt = save(tmp_path, 1, 2)
    flip(corrupt)
    saved = save(tmp_path, *steps)
    assert_holds(tmp_path, steps[-1])
    flip(saved[-1])
    before = [step for step in (1, *steps[:-1]) if step < steps[-1]]
    assert_holds(tmp_path, before[-1])


def test_training_anew_from_an_earlier_step_drops_later_files(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    save(tmp_path, 15)
    assert_holds(tmp_path, 15)
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == [
        "step-000000010.safetensors",
        "step-000000015.safetensors",
    ]


INDEX_DAMAGES = {
    "missing": None,
    "empty": "",
    "cut": '{"schema": 1, "check',
    "of another shape": "[]",
    "without checkpoints": "{}",
    "of other entries": '{"checkpoints": [3]}',
    "of lacking entries": '{"checkpoints": [{"file": "step-000000002.safetensors"}]}',
    "of no list": '{"checkpoints": 3}',
}


@pytest.mark.parametrize("content", INDEX_DAMAGES.values(), ids=INDEX_DAMAGES.keys())
def test_a_damaged_index_is_named_and_the_files_are_used(
    tmp_path: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    _, newest = save(tmp_path, 1, 2)
    index = tmp_path / "index.json"
    index.unlink() if content is None else index.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert_holds(tmp_path, 2)
    assert str(index) in caplog.text
    cut(newest)
    assert_holds(tmp_path, 1)
    save(tmp_path, 3)
    assert [entry["file"] for entry in json.loads(index.read_text())["checkpoints"]][-1] == "step-000000003.safetensors"
    assert_holds(tmp_path, 3)


def test_killed_between_the_file_and_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, 2)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoints, "write_json", killed)
        save(tmp_path, 3)
    assert_holds(tmp_path, 2)
    save(tmp_path, 3, 4)
    assert_holds(tmp_path, 4)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_killed_while_writing_the_file(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".step-000000002.safetensors.x1y2.safetensors"
    leftover.write_bytes(b"half")
    assert_holds(tmp_path, 1)
    save(tmp_path, 2)
    assert not leftover.exists()
    assert_holds(tmp_path, 2)


def test_names_in_the_index_never_leave_the_folder(tmp_path: Path) -> None:
    (outside,) = save(tmp_path / "other", 9)
    save(tmp_path / "mine", 1)
    entry = json.loads((tmp_path / "other" / "index.json").read_text())["checkpoints"][0]
    entry["file"] = f"../other/{outside.name}"
    (tmp_path / "mine" / "index.json").write_text(json.dumps({"schema": 1, "checkpoints": [entry]}))
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint(tmp_path / "mine")


def test_a_file_of_tensors_that_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "step-000000001.safetensors")
    with pytest.raises(CorruptCheckpoint):
        load_checkpoint(tmp_path)
