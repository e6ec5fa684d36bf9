"""What is installed: recorded with every result."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("fitnest", "torch", "onnxruntime", "onnx", "optuna", "numpy", "scikit-learn", "pandas", "matplotlib")


def versions() -> dict[str, str]:
    """Versions of Python and the packages, and the commit where the code runs from a checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    commit = commit_of(Path(__file__).parent)
    return found | ({"commit": commit} if commit else {})


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with `-dirty` when files differ from it; empty outside one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""
