"""Every family through the whole chain: train, extract, recalibrate, quantize, write, run, search, export.

A new family is tested by its line in `FAMILIES`; nothing here or in the packages may know it by name.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import nas
from hardware_profiles.machine import int8_weight_limit
from hardware_profiles.onnx_writer import INTEGER_OPERATORS, integer_kernels, write_onnx
from nas.data import Split
from nas.evaluate import calibration_images
from search_spaces import FAMILIES, Architecture, SearchSpace, build_space

ROOT = Path(__file__).parents[2]

# Small instances; a family without an entry is tested with its own defaults.
SMALL: dict[str, dict[str, object]] = {
    "mobilenet": {"widths": [16, 24], "depths": [1, 2], "expansions": [1, 2], "stem_width": 8, "head_width": 32},
    "compact_transformer": {"embeddings": [16, 32], "depths": [1, 2], "heads": [1, 2], "head_size": 16},
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Beside another job, a second thread makes networks this small many times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> nas.Data:
    return nas.load_data("digits", val_search=100, val_front=100, calibration=128)


@pytest.fixture(params=sorted(FAMILIES), scope="module")
def space(request: pytest.FixtureRequest) -> SearchSpace:
    common = {"resolutions": [8], "channels": 1, "classes": 10}
    return build_space(request.param, SMALL.get(request.param, {}) | common)


@pytest.fixture(scope="module")
def supernet(space: SearchSpace, data: nas.Data) -> nas.Supernet:
    torch.set_num_threads(1)
    supernet = nas.Supernet(space)
    results = nas.train(
        supernet, data, epochs=8, batch_size=32, optimizer="adamw", learning_rate=0.01, architectures=6,
        arithmetic="fp32", evaluate_every=8,
    )  # fmt: skip
    assert results["largest"] > 0.8
    return supernet.eval()


def architectures(space: SearchSpace) -> dict[str, Architecture]:
    """The extremes in int8 and some of random precisions."""
    rng = np.random.default_rng(5)
    return {
        "smallest": space.with_precision(space.smallest, "int8"),
        "largest": space.with_precision(space.largest, "int8"),
        **{f"random {number}": space.sample(rng) for number in range(4)},
    }


def test_deployed_in_onnxruntime_as_in_torch(supernet: nas.Supernet, data: nas.Data) -> None:
    limit = int8_weight_limit()
    for name, architecture in architectures(supernet.space).items():
        subnet = supernet.extract(architecture)
        images = calibration_images(data, subnet)
        quantized = nas.quantize(nas.recalibrate(subnet, images), images, limit)
        network = quantized.folded.network
        model = write_onnx(network, quantized.folded.weights(), quantized.ranges, weight_limit=limit)
        onnx.checker.check_model(model, full_check=True)
        content = model.SerializeToString()
        kernels = integer_kernels(content, network)
        asked = {layer for layer, precision in network.precisions.items() if precision == "int8"}
        assert asked <= kernels.keys() and all(kernels[layer] in INTEGER_OPERATORS for layer in asked), name
        assert name.startswith("random") or asked == network.precisions.keys()
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        agreed, largest, differences = [], 0.0, []
        for x, _ in data.batches("val_front", 8):
            with torch.inference_mode():
                expected = quantized.simulated(x).numpy()
            got = session.run(None, {"input": x.numpy()})[0]
            agreed += (got.argmax(1) == expected.argmax(1)).tolist()
            largest = max(largest, float(np.abs(expected).max()))
            differences.append(float(np.abs(got - expected).max()))
        assert np.mean(agreed) >= 0.98, name
        assert max(differences) <= 0.1 * largest, name


class Forbidden(Split):
    def batches(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("a split that a search must not read")


def test_search_and_export(supernet: nas.Supernet, data: nas.Data, tmp_path: Path) -> None:
    splits = dict(data.splits)
    for name in ("test", "val_front"):
        splits[name] = Forbidden(splits[name].images, splits[name].indices, splits[name].labels)
    front = nas.search(
        supernet,
        replace(data, splits=splits),
        objectives=[nas.maximize("accuracy"), nas.minimize("macs"), nas.minimize("model_bytes")],
        trials=8,
        population=4,
        seed=1,
    )
    found = {supernet.space.parse(point.architecture): point for point in front.points}
    assert len(found) >= 2
    for architecture, point in found.items():
        network = supernet.space.lower(architecture)
        assert point["macs"] == network.macs and point["model_bytes"] == network.model_bytes
        assert 0 <= point["accuracy"] <= 1
    chosen = supernet.space.with_precision(supernet.space.largest, "int8")
    manifest = nas.export(supernet, chosen, data, tmp_path)
    folder = tmp_path / chosen.id
    assert sorted(path.name for path in folder.iterdir()) == ["card.md", "manifest.json", "model.onnx"]
    assert json.loads((folder / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
    assert manifest["architecture"] == str(chosen) and set(manifest["precisions"].values()) == {"int8"}  # type: ignore[attr-defined]
    assert manifest["parity"]["top1_agreement"] >= 0.99  # type: ignore[index]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    right = 0
    for x, labels in data.batches("test", 8):
        right += int((session.run(None, {"input": x.numpy()})[0].argmax(1) == labels.numpy()).sum())
    assert manifest["accuracy"]["test"] == pytest.approx(right / len(data["test"]))  # type: ignore[index]


# no family by name ---------------------------------------------------------------------------------------

NAMES = tuple(name.lower() for name in (*FAMILIES, *(kind.__name__ for kind in FAMILIES.values())))


def mentions(source: str) -> list[str]:
    """Identifiers and texts that name a family; comments and docstrings may."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    found = []
    for node in ast.walk(tree):
        texts = [getattr(node, field, None) for field in ("id", "attr", "name", "arg", "module", "asname")]
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            texts.append(node.value)
        named = [text for text in texts if isinstance(text, str) and any(name in text.lower() for name in NAMES)]
        found += [f"line {getattr(node, 'lineno', '?')}: {text!r}" for text in named]
    return found


def test_mentions_are_found() -> None:
    assert mentions('"""Of MobileNet."""\ndef f() -> int:\n    "mobilenet"\n    return 1  # mobilenet\n') == []
    for source in ("from search_spaces import MobileNet", "x = 'a compact_transformer'", "mobilenet_special = 1"):
        assert len(mentions(source)) == 1


@pytest.mark.parametrize(
    "path",
    [path for package in ("nas", "predictors", "hardware_profiles") for path in sorted((ROOT / package).rglob("*.py"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_module_knows_a_family_by_name(path: Path) -> None:
    assert mentions(path.read_text(encoding="utf-8")) == []
