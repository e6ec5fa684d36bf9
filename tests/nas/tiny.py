"""What the tests of searching, measuring and exporting share: a small space, its data, and devices of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from hardware_profiles import DeviceProfile, load_device
from hardware_profiles.measurement import Measurement, Provenance
from nas.data import Data, from_arrays
from nas.evaluator import Score
from nas.supernet import Supernet
from search_spaces import Architecture, MobileNet, SearchSpace

torch.set_num_threads(1)  # beside another job, a second thread makes networks this small many times slower

SPACE: dict[str, Any] = {
    "resolutions": [8],
    "widths": [8, 16],
    "width_multipliers": [0.5, 1.0],
    "strides": [1, 2],
    "depths": [1, 2],
    "kernels": [3],
    "expansions": [1, 2],
    "stem_width": 8,
    "head_width": 16,
}

# microseconds a thousand multiply-accumulates, by family and precision
KERNELS = {
    "conv": (1.0, 0.5),
    "pointwise": (1.0, 0.5),
    "depthwise": (2.0, 1.0),
    "linear": (1.0, 0.5),
}


def device_yaml(name: str = "toy", **changed: Any) -> str:
    """A device with a latency model, a planner and 40,000 bytes of SRAM, which runs fp32 and int8."""
    coefficients: dict[str, float] = {"quantize.int8.count": 0.001, "dequantize.int8.count": 0.001}
    for family, prices in KERNELS.items():
        for precision, price in zip(("fp32", "int8"), prices, strict=True):
            coefficients[f"{family}.{precision}.macs"] = price * 1e-6
    for family in ("add", "average_pool", "reshape"):
        coefficients |= {f"{family}.{precision}.count": 0.0 for precision in ("fp32", "int8")}
    kinds = ("conv2d", "linear", "pool", "add", "reshape")
    content: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "title": "A device that only tests have",
        "kind": "mcu",
        "runtime": "none",
        "threads": 1,
        "limits": {
            "sram_bytes": {"value": 40_000, "source": "made up"},
            "flash_bytes": {"value": 100_000, "source": "made up"},
        },
        "precisions": {"source": "made up", "value": {kind: ["fp32", "int8"] for kind in kinds}},
        "memory": {
            "planner": "inplace_depthwise",
            "sram_overhead": {"value": 0.0, "source": "made up"},
            "flash_overhead_bytes": {"value": 0, "source": "made up"},
        },
        "latency": {
            "origin": "fitted",
            "source": "made up",
            "constant_ms": 0.01,
            "relative_error": 0.1,
            "held_out": {"median_error": 0.05},
            "coefficients_ms": coefficients,
        },
    }
    return yaml.safe_dump(content | changed)


def write_device(folder: Path, name: str = "toy", **changed: Any) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(device_yaml(name, **changed), encoding="utf-8")
    return path


def device(folder: Path, name: str = "toy", **changed: Any) -> DeviceProfile:
    return load_device(write_device(folder, name, **changed))


@cache
def space(**changed: Any) -> SearchSpace:
    return MobileNet(**(SPACE | {"channels": 1, "classes": 3} | changed))


@cache
def data(count: int = 240) -> Data:
    """Three classes of 8x8 images that differ in the brightness of three thirds."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % 3
    images = rng.uniform(0.0, 0.6, (count, 8, 8))
    for label, columns in enumerate((slice(0, 3), slice(3, 5), slice(5, 8))):
        images[labels == label, :, columns] += 0.4
    return from_arrays(images, labels, calibration=64, val_search=0.2, val_front=0.2, seed=0)


def supernet(seed: int = 0) -> Supernet:
    """Random weights and norms, never trained."""
    net = Supernet(space(), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in net.named_parameters():
            if name.endswith(("norm_scale", "norm_shift", "bias")):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
    return net.eval()


class FakeEvaluator:
    """Accuracies by a formula, in no time; counts what was asked. A twin of `nas.Evaluator` without weights."""

    def __init__(self, space_: SearchSpace, key: str = "fake") -> None:
        self.space, self.key, self.supernet_sha256 = space_, key, f"sha of {key}"
        self.data = {"val_search": range(10_000), "val_front": range(10_000)}
        self.asked: list[tuple[Architecture, str]] = []

    def accuracy(self, architecture: Architecture, split: str) -> float:
        self.asked.append((architecture, split))
        return formula(architecture, split)

    def score(
        self, architecture: Architecture, split: str, is_enough: Callable[[Score], bool] = lambda score: False
    ) -> Score:
        images = len(self.data[split])
        return Score(round(images * self.accuracy(architecture, split)), images, images)


def formula(architecture: Architecture, split: str) -> float:
    """More of everything is better, with some noise that depends on the architecture and the split."""
    size = sum(architecture.codes) / len(architecture.codes)
    digest = hashlib.sha256(f"{architecture}{split}".encode()).digest()
    return round(0.5 + 0.3 * size + 0.05 * digest[0] / 255, 4)


def measurement(latency_ms: float) -> Measurement:
    provenance = Provenance("host-cpu", "onnxruntime 0", 1, 1, "mixed", "a processor", "2026-01-01T00:00:00+00:00", 0.1)
    return Measurement(latency_ms, latency_ms, latency_ms, 0.0, 10, 10, provenance)


def experiment(folder: Path, **changed: Any) -> dict[str, Any]:
    """A whole experiment on scikit-learn's digits, of a few seconds, without anything measured."""
    return {
        "name": "tiny",
        "data": {"path": "digits", "calibration": 128},
        "space": {"family": "mobilenet", **SPACE},
        "train": {"epochs": 2, "arithmetic": "fp32"},
        "devices": [{"name": str(write_device(folder))}],
        "search": {"objectives": ["accuracy", "latency_ms@toy", "model_bytes"], "trials": 24, "population": 6},
        "export": {"best": "accuracy", "limits": ["int8_macs_share>=0.5"]},
    } | changed


def write_experiment(folder: Path, **changed: Any) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(experiment(folder, **changed)), encoding="utf-8")
    return path
