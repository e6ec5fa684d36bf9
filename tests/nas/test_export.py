"""Exports: what is written, that it is true, and that nothing is written when it is not."""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

import nas
from hardware_profiles import load_device
from hardware_profiles.host_cpu import NoisyMachine
from hardware_profiles.onnx_writer import INTEGER_OPERATORS
from nas.costs import Figure, ProfiledDevice
from nas.evaluator import Evaluator
from nas.export import ExportFailed, export_key
from nas.front import Evaluation
from nas.supernet import Subnet
from search_spaces import Architecture, InvalidArchitecture
from tests.nas import tiny

module = importlib.import_module("nas.export")


@pytest.fixture(autouse=True)
def _bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measure", lambda models, device, **_: {name: tiny.measurement(0.5) for name in models})


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    """Trained a little, so that its images have one answer and not a tie between three."""
    net = tiny.supernet()
    nas.train(net, tiny.data(), epochs=6, batch_size=16, arithmetic="fp32")
    return Evaluator(net, tiny.data())


def mixed(evaluator: Evaluator) -> Architecture:
    space = evaluator.supernet.space
    return space.build({**space.with_precision(space.largest, "int8").values, "head.precision": "fp32"})


@pytest.mark.parametrize("kind", ["fp32", "int8", "mixed"])
def test_the_model_does_what_the_manifest_says(kind: str, evaluator: Evaluator, tmp_path: Path) -> None:
    space, data = evaluator.supernet.space, tiny.data()
    architecture = mixed(evaluator) if kind == "mixed" else space.with_precision(space.largest, kind)
    toy = ProfiledDevice(tiny.device(tmp_path))
    mcu = ProfiledDevice(load_device("stm32f746"))
    made = nas.export(evaluator.supernet, architecture, data, tmp_path / "out", devices=[toy, mcu], evaluator=evaluator)
    folder = tmp_path / "out" / architecture.id
    assert sorted(p.name for p in folder.iterdir()) == ["card.md", "manifest.json", "model.onnx"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == [architecture.id]
    manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    assert manifest == json.loads(json.dumps(made))
    content = (folder / "model.onnx").read_bytes()
    onnx.checker.check_model(onnx.load_from_string(content), full_check=True)
    for name, digest in manifest["files"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest

    # what it computes, on every test image, by a session of our own
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    simulated = evaluator.deploy(architecture).simulated
    answers, expected, labels = [], [], []
    for pixels, label in data["test"].batches(7):
        scaled = pixels.numpy().astype(np.float32) / 255
        mean, std = (np.array(manifest["input"][k], np.float32).reshape(1, -1, 1, 1) for k in ("mean", "std"))
        answers.append(session.run(["logits"], {"input": (scaled - mean) / std})[0])
        expected.append(simulated(data.prepare(pixels, 8)).detach().numpy())
        labels.append(label.numpy())
    got, torch_logits, truth = map(np.concatenate, (answers, expected, labels))
    assert manifest["accuracy"]["test"] == pytest.approx((got.argmax(1) == truth).mean(), abs=1e-9)
    assert manifest["accuracy"]["test_torch"] == pytest.approx((torch_logits.argmax(1) == truth).mean(), abs=1e-9)
    assert manifest["accuracy"]["validation"] == evaluator.accuracy(architecture, "val_front")
    assert manifest["parity"]["images"] == len(truth) == manifest["accuracy"]["test_images"]
    assert manifest["parity"]["top1_agreement"] == pytest.approx((got.argmax(1) == torch_logits.argmax(1)).mean())
    assert manifest["parity"]["max_abs_difference"] == pytest.approx(
        np.abs(got - torch_logits).max(), rel=0.2, abs=1e-5
    )

    # what it is
    network = space.lower(architecture)
    assert manifest["architecture"] == str(architecture) and space.parse(manifest["architecture"]) == architecture
    assert manifest["precisions"] == network.precisions and manifest["supernet_sha256"] == evaluator.supernet_sha256
    assert (manifest["macs"], manifest["model_bytes"]) == (network.macs, network.model_bytes)
    assert manifest["file_bytes"] == len(content) and manifest["versions"]["onnxruntime"] == onnxruntime.__version__
    int8 = {name for name, precision in manifest["precisions"].items() if precision == "int8"}
    assert int8 <= set(manifest["integer_kernels"])
    assert set(manifest["integer_kernels"].values()) <= INTEGER_OPERATORS
    assert bool(int8) == (kind != "fp32")
    costs = manifest["devices"]["toy"]
    assert costs["latency_ms"]["predicted"]["value"] == toy.figure(network, "latency_ms").value
    assert costs["flash_bytes"] == network.model_bytes and costs["fits"] and costs["planner"] == "inplace_depthwise"
    assert "measured" not in costs["latency_ms"]
    assert manifest["devices"]["stm32f746"]["legal"] == (kind == "int8")
    if kind == "int8":
        assert manifest["devices"]["stm32f746"]["latency_ms"]["predicted"]["low"] is None
    shown = (folder / "card.md").read_text()
    assert f"{manifest['accuracy']['test']:.2%}" in shown and "nan" not in shown


def test_a_board_of_known_power_has_its_energy(evaluator: Evaluator, tmp_path: Path) -> None:
    space = evaluator.supernet.space
    board = nas.profile(space, load_device("stm32l4r5-cmsisnn"))
    architecture = space.with_precision(space.largest, "int8")
    manifest: Any = nas.export(evaluator.supernet, architecture, tiny.data(), tmp_path, devices=[board])
    costs = manifest["devices"]["stm32l4r5-cmsisnn"]
    assert costs["energy_uj"]["value"] == pytest.approx(51.8491 * costs["latency_ms"]["predicted"]["value"])
    assert costs["energy_uj"]["origin"] == "predicted"
    assert f"{costs['energy_uj']['value']:.4g} predicted" in next(tmp_path.glob("*/card.md")).read_text()


def test_without_devices_this_machine_is_measured(evaluator: Evaluator, tmp_path: Path) -> None:
    architecture = evaluator.supernet.space.largest
    network = evaluator.supernet.space.lower(architecture)
    figures = {"latency_ms@host-cpu": Figure(0.6, 0.55, 0.65, "predicted")}
    point = Evaluation(architecture.id, str(architecture), figures, network.precisions)
    manifest: Any = nas.export(evaluator.supernet, point, tiny.data(), tmp_path)
    latency = manifest["devices"]["host-cpu"]["latency_ms"]
    assert latency["predicted"] == {"value": 0.6, "low": 0.55, "high": 0.65, "origin": "predicted"}
    assert latency["measured"]["latency_ms"] == 0.5 and latency["measured"]["provenance"]["runtime"] == "onnxruntime 0"
    bare: Any = nas.export(evaluator.supernet, architecture, tiny.data(), tmp_path)
    assert "not profiled" in bare["devices"]["host-cpu"]["latency_ms"]["not_predicted"] or (
        "no latency model" in bare["devices"]["host-cpu"]["latency_ms"]["not_predicted"]
    )
    measured = Evaluation(
        point.id, point.architecture, {"latency_ms@host-cpu": Figure(0.5, 0.4, 0.6, "measured")}, {}, figures
    )
    again: Any = nas.export(evaluator.supernet, measured, tiny.data(), tmp_path)
    assert again["devices"]["host-cpu"]["latency_ms"]["predicted"]["value"] == 0.6


def test_a_busy_machine_leaves_the_latency_out_and_says_so(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NoisyMachine("too slow just now")

    monkeypatch.setattr(module, "measure", refuse)
    manifest: Any = nas.export(evaluator.supernet, evaluator.supernet.space.smallest, tiny.data(), tmp_path)
    latency = manifest["devices"]["host-cpu"]["latency_ms"]
    assert latency["not_measured"] == "too slow just now" and "measured" not in latency


@pytest.mark.parametrize("failure", ["agreement", "kernel", "missing", "checker"])
def test_nothing_is_written_when_verification_fails(
    failure: str, evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = evaluator.supernet.space
    architecture = space.with_precision(space.largest, "int8")
    said = {
        "agreement": "agree on",
        "kernel": r"does not compute stem \(Conv\)",
        "missing": r"does not compute stem \(missing\)",
        "checker": "NoSuchOperator",
    }[failure]
    kind: type[Exception] = ExportFailed
    if failure == "agreement":
        monkeypatch.setattr(module, "LEAST_AGREEMENT", 1.01)
    elif failure == "checker":
        real = module.write_onnx

        def broken(*arguments: Any, **options: Any) -> onnx.ModelProto:
            model = real(*arguments, **options)
            model.graph.node[0].op_type = "NoSuchOperator"
            return model

        monkeypatch.setattr(module, "write_onnx", broken)
        kind = onnx.checker.ValidationError
    else:
        operators = dict.fromkeys(space.lower(architecture).precisions, "QLinearConv")
        operators["stem"] = "Conv" if failure == "kernel" else "missing"
        monkeypatch.setattr(module, "integer_kernels", lambda *_: operators)
    with pytest.raises(kind, match=said):
        nas.export(evaluator.supernet, architecture, tiny.data(), tmp_path / "out", evaluator=evaluator)
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_whole(evaluator: Evaluator, tmp_path: Path) -> None:
    architecture = evaluator.supernet.space.smallest
    old = tmp_path / architecture.id
    old.mkdir()
    (old / "stale.txt").write_text("from before")
    nas.export(evaluator.supernet, architecture, tiny.data(), tmp_path, devices=[], evaluator=evaluator)
    assert sorted(p.name for p in old.iterdir()) == ["card.md", "manifest.json", "model.onnx"]
    assert [p.name for p in tmp_path.iterdir()] == [architecture.id]


def test_the_key_knows_weights_architecture_and_devices(evaluator: Evaluator, tmp_path: Path) -> None:
    space = evaluator.supernet.space
    toy = ProfiledDevice(tiny.device(tmp_path))
    slow = ProfiledDevice(tiny.device(tmp_path, threads=2))
    others = Evaluator(tiny.supernet(5), tiny.data())
    keys = [
        export_key(evaluator, space.largest, [toy]),
        export_key(evaluator, space.largest, []),
        export_key(evaluator, space.largest, [slow]),
        export_key(evaluator, space.smallest, [toy]),
        export_key(others, space.largest, [toy]),
    ]
    assert len(set(keys)) == len(keys)


def test_an_architecture_of_another_space_is_refused(evaluator: Evaluator, tmp_path: Path) -> None:
    other = tiny.space(depths=(1, 2, 3)).largest
    with pytest.raises(InvalidArchitecture):
        nas.export(evaluator.supernet, other, tiny.data(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_memory_that_is_too_small_is_told(evaluator: Evaluator, tmp_path: Path) -> None:
    limits = {
        "sram_bytes": {"value": 10, "source": "made up"},
        "flash_bytes": {"value": 10_000_000, "source": "made up"},
    }
    toy = ProfiledDevice(tiny.device(tmp_path, limits=limits))
    manifest: Any = nas.export(
        evaluator.supernet, evaluator.supernet.space.smallest, tiny.data(), tmp_path, devices={"toy": toy}
    )
    assert manifest["devices"]["toy"]["fits"] is False
    assert "(does not fit)" in (tmp_path / manifest["id"] / "card.md").read_text()


def test_patches_are_told_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space, data = tiny.space(patches=(1, 2), patch_stages=(2,)), tiny.data()
    net = nas.Supernet(space)
    nas.train(net, data, epochs=4, batch_size=16, arithmetic="fp32")
    evaluator = Evaluator(net, data)
    architecture = space.with_precision(space.build({**space.largest.values, "patches": 2}), "int8")
    mcu = ProfiledDevice(load_device("stm32f746"))
    made: dict[str, Any] = nas.export(net, architecture, data, tmp_path, devices=[mcu], evaluator=evaluator)
    network = space.lower(architecture)
    told = made["patches"]
    assert (told["per_side"], told["last_layer"]) == (2, "stage2.block0.project")
    assert network.macs < told["macs_clipped"] <= told["macs"] == made["devices"]["stm32f746"]["macs"]
    assert told["top1_agreement_with_whole"] >= 0.99

    monkeypatch.setattr(Subnet, "in_patches", lambda subnet, x: -subnet(x))
    with pytest.raises(ExportFailed, match=r"running 2 patches a side up to 'stage2\.block0\.project' agrees with"):
        nas.export(net, architecture, data, tmp_path / "other", devices=[mcu], evaluator=evaluator)
    assert not (tmp_path / "other").exists() or not any((tmp_path / "other").iterdir())
