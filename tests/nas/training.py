"""What the tests of training share: small spaces, their data, and a sudden death."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nas.checkpoints import load_checkpoint
from nas.data import Data, from_arrays
from nas.supernet import Supernet
from nas.train_settings import TrainSettings
from search_spaces import CompactTransformer, MobileNet, SearchSpace

MOBILENET: dict[str, Any] = {
    "resolutions": (8,), "channels": 1, "classes": 4, "widths": (8,), "width_multipliers": (1,), "divisor": 4,
    "depths": (1, 2, 3), "kernels": (3,), "expansions": (2, 3, 4), "squeeze_excite": (False,), "stem_width": 8,
    "head_width": 16, "precisions": ("fp32",),
}  # fmt: skip

SPACES: dict[str, SearchSpace] = {
    "elastic": MobileNet(
        **MOBILENET
        | {"resolutions": (8, 10), "width_multipliers": (0.5, 1), "depths": (1, 2), "kernels": (3, 5)}
        | {"precisions": ("int8", "fp32")}
    ),
    "transformer": CompactTransformer(
        resolutions=(8,), channels=1, classes=4, embeddings=(8, 16), depths=(1, 2), heads=(1, 2), head_size=4,
        mlp_ratios=(1, 2), tokenizer_pools=(True,), precisions=("fp32",),
    ),
    "coupled": MobileNet(**MOBILENET | {"coupled": True}),
}  # fmt: skip

QUICK = TrainSettings(steps=12, batch_size=24, arithmetic="fp32", warmup=0.1, ramp=0.2)


class Killed(BaseException):
    """As sudden as a test can be: nothing in the trainer may catch it."""


def corners(count: int = 240, seed: int = 0) -> Data:
    """Noise of 8x8 pixels, with one corner brighter: which one is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    x = rng.integers(0, 120, (count, 8, 8), dtype=np.uint8)
    for image, label in zip(x, labels, strict=True):
        image[4 * (label // 2) :, :][:4, 4 * (label % 2) :][:, :4] += 100
    return from_arrays(x, labels, calibration=64, val_search=0.2, val_front=0.1)


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Die in the middle of a step, after its events, when every step before it was kept."""
    trainer = importlib.import_module("nas.train")
    runner = importlib.import_module("nas.train_step").StepRunner
    real = runner.gradients

    def until(held: Any, plan: Any, number: int, *rest: Any) -> float:
        if number == step:
            raise Killed
        loss: float = real(held, plan, number, *rest)
        return loss

    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", -1.0)
    monkeypatch.setattr(runner, "gradients", until)


def assert_equal(a: Supernet, b: Supernet) -> None:
    other = b.state_dict()
    assert [name for name, tensor in a.state_dict().items() if not torch.equal(tensor, other[name])] == []


def timeless(results: dict[str, Any]) -> dict[str, Any]:
    """Without what a clock says."""
    return {name: value for name, value in results.items() if name != "seconds"}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [timeless(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_runs(folders: Sequence[Path]) -> None:
    """Metrics, and everything in the newest checkpoints."""
    first, second = (load_checkpoint(folder / "supernet") for folder in folders)
    assert first is not None and second is not None
    assert first[0].keys() == second[0].keys()
    assert [name for name, tensor in first[0].items() if not torch.equal(tensor, second[0][name])] == []
    states = [{**timeless(found[1]), "results": timeless(found[1]["results"])} for found in (first, second)]  # type: ignore[arg-type]
    assert states[0] == states[1]
    assert metrics(folders[0]) == metrics(folders[1])
