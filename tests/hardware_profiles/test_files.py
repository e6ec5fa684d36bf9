"""Files appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from hardware_profiles.files import read_json, replacing, sha256_of, write_bytes, write_json, write_text


def test_round_trips(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "folder" / "a.txt", "größer\n")
    assert (tmp_path / "new" / "folder" / "a.txt").read_bytes() == "größer\n".encode()
    write_bytes(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    write_json(tmp_path / "c.json", {"a": [1, 2.5], "b": None})
    assert read_json(tmp_path / "c.json") == {"a": [1, 2.5], "b": None} == json.loads((tmp_path / "c.json").read_text())


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_text("half")
        assert path.read_text() == "old"
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{}", b'{"a": }'])
def test_broken_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is not readable as JSON .*delete it"):
        read_json(tmp_path / "a.json")


def test_json_must_be_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"a\.json: expected a JSON object, got list"):
        read_json(tmp_path / "a.json")


def test_sha256_of_a_file_longer_than_a_block(tmp_path: Path) -> None:
    content = bytes(range(256)) * 9000
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()
