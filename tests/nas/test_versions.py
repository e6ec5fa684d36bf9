"""What is recorded about the installation."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from nas import versions as module
from nas.versions import commit_of, versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, env=kept, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    try:
        git(tmp_path, "init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_versions_are_those_of_the_modules() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert (found["torch"], found["numpy"]) == (torch.__version__.split("+")[0], np.__version__) or (
        found["torch"].startswith(torch.__version__.split("+")[0])
    )
    assert found["onnxruntime"] == onnxruntime.__version__
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?", found.get("commit", "0000000"))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("no-such-package",))
    assert versions()["no-such-package"] == "not installed"


def test_a_module_that_another_distribution_brings_has_the_version_of_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = tmp_path / "fakeruntime_gpu-9.8.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: fakeruntime-gpu\nVersion: 9.8\n")
    (told / "top_level.txt").write_text("fakeruntime\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert module.version_of("fakeruntime") == "9.8"


def test_commit_of_a_checkout(checkout: Path) -> None:
    commit = commit_of(checkout / "package")
    assert len(commit) >= 7 and git(checkout, "rev-parse", "HEAD").startswith(commit)
    (checkout / "package" / "a.py").write_text("2\n")
    assert commit_of(checkout / "package") == f"{commit}-dirty"


def test_results_do_not_make_a_checkout_dirty(checkout: Path) -> None:
    results = checkout / "experiments" / "results"
    results.mkdir(parents=True)
    (results / "runs.jsonl").write_text("one line\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "results")
    (results / "runs.jsonl").write_text("two lines\n")
    assert git(checkout, "rev-parse", "HEAD").startswith(commit_of(checkout / "package"))
    (checkout / "experiments" / "a.py").write_text("1\n")
    git(checkout, "add", ".")
    assert commit_of(checkout / "package").endswith("-dirty")


def test_a_tag_does_not_hide_the_commit(checkout: Path) -> None:
    git(checkout, "tag", "v1")
    assert git(checkout, "rev-parse", "HEAD").startswith(commit_of(checkout / "package"))


def test_a_package_installed_in_somebody_elses_checkout_has_no_commit(checkout: Path) -> None:
    installed = checkout / ".venv" / "package"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("1\n")
    assert commit_of(installed) == ""


def test_no_checkout_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("PATH", "")
    assert commit_of(tmp_path) == ""
    assert "commit" not in versions()
