"""Training checkpoints: safetensors files with their SHA-256, the last two kept, nothing pickled."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hardware_profiles.files import read_json, replacing, sha256_of, write_json

KEPT = 2
INDEX = "index.json"

log = logging.getLogger(__name__)


class Entry(TypedDict):
    """A line of the index."""

    file: str
    sha256: str


class CorruptCheckpoint(RuntimeError):
    """No checkpoint of a folder can be read."""


def save_checkpoint(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write the checkpoint of a step, then the index, then delete all but the last two that are intact.

    Checkpoints of later steps are of a training that was given up (the newest was corrupt), so they go too.
    """
    for unfinished in folder.glob(".step-*.safetensors"):  # of a process that was killed
        unfinished.unlink()
    path = folder / f"step-{step:09d}.safetensors"
    before = [entry for entry in _entries(folder) if entry["file"] < path.name and _is_intact(folder, entry)]
    contiguous = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(contiguous, temporary, metadata={"state": json.dumps(state)})
    newest: Entry = {"file": path.name, "sha256": sha256_of(path)}
    entries = [*before, newest][-KEPT:]
    write_json(folder / INDEX, {"schema": 1, "checkpoints": entries})
    listed = {entry["file"] for entry in entries}
    for old in folder.glob("step-*.safetensors"):
        if old.name not in listed:
            old.unlink()
    return path


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, object]] | None:
    """(tensors, state) of the newest readable checkpoint, or None where there is none yet.

    A corrupt file is named in a warning and the one before it is used; raises CorruptCheckpoint when none is left.
    """
    entries = _entries(folder)
    for entry in reversed(entries):
        path = folder / entry["file"]
        try:
            return _read(path, entry["sha256"])
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("%s is corrupt (%s); falling back to the checkpoint before it", path, error)
    if entries:
        raise CorruptCheckpoint(f"no checkpoint in {folder} is readable; delete the folder to train anew")
    return None


def _read(path: Path, sha256: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    if sha256_of(path) != sha256:
        raise ValueError("its SHA-256 differs from the one recorded")
    with safe_open(path, framework="pt") as opened:
        described = (opened.metadata() or {}).get("state")
        if described is None:
            raise ValueError("it holds no training state")
        return {name: opened.get_tensor(name) for name in opened.keys()}, json.loads(described)  # noqa: SIM118


def _is_intact(folder: Path, entry: Entry) -> bool:
    path = folder / entry["file"]
    return path.is_file() and sha256_of(path) == entry["sha256"]


def _entries(folder: Path) -> list[Entry]:
    """What the index lists, oldest first; where it is lost, the files there are, as they are."""
    path = folder / INDEX
    try:
        listed = cast(list[Entry], read_json(path)["checkpoints"])
        return [{"file": Path(entry["file"]).name, "sha256": entry["sha256"]} for entry in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        found = sorted(folder.glob("step-*.safetensors"))
        if found or path.exists():
            log.warning("%s is not readable (%s); using the checkpoints beside it unverified", path, error)
    return [{"file": file.name, "sha256": sha256_of(file)} for file in found]
