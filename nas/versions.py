"""What is installed: recorded with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path

PACKAGES = ("fitnest", "torch", "onnxruntime", "onnx", "optuna", "numpy", "scikit-learn", "pandas", "matplotlib")
NOT_INSTALLED = "not installed"
RESULTS = "experiments/results"


def versions() -> dict[str, str]:
    """Versions of Python and the packages, and the commit where the code runs from a checkout."""
    found = {"python": platform.python_version()}
    found |= {package: version_of(package) for package in PACKAGES}
    commit = commit_of(Path(__file__).parent)
    return found | ({"commit": commit} if commit else {})


def version_of(package: str) -> str:
    """The version of a package, or of another that brings its module, as onnxruntime-gpu does for onnxruntime."""
    try:
        return version(package)
    except PackageNotFoundError:
        others = packages_distributions().get(package)
        return version(others[0]) if others else NOT_INSTALLED


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with `-dirty` when files differ from it; empty outside one.

    Results do not count: a benchmark that goes on from its own file is still of its commit. A package installed inside
    somebody's checkout is not of that commit, so the folder must hold tracked files.
    """
    tracked = _git(folder, "ls-files", "--", ".")
    if not tracked:
        return ""
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ":/", f":/!{RESULTS}")
    return _git(folder, "rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; empty when it is not installed, fails or hangs."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", *arguments],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
