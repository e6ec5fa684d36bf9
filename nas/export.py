"""Export: a subnet as a verified ONNX model, with a manifest and a card.

Nothing is left in the folder unless the model passes: the ONNX checker, an integer kernel in onnxruntime for
every layer called quantized, and agreement with torch on the test images.
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from hardware_profiles import UnavailableCost, UnsupportedLayer, load_device
from hardware_profiles.files import sha256_of, write_bytes, write_json, write_text
from hardware_profiles.host_cpu import DEVICE, NoisyMachine
from hardware_profiles.onnx_writer import INTEGER_OPERATORS, integer_kernels, write_onnx
from hardware_profiles.patches import executed_macs
from nas.costs import Figure, ProfiledDevice
from nas.data import RESIZING, Data
from nas.evaluate import accuracy, resolution_of
from nas.evaluator import Evaluator
from nas.front import Evaluation
from nas.profile import measure
from nas.quantize import Quantized
from nas.supernet import Supernet
from nas.versions import versions
from search_spaces import Architecture, Network

log = logging.getLogger(__name__)

SCHEMA = 1
LEAST_AGREEMENT = 0.99


class ExportFailed(RuntimeError):
    """The model written does not do what the subnet does; nothing was kept."""


def export(
    supernet: Supernet,
    chosen: Evaluation | Architecture,
    data: Data,
    folder: str | Path,
    *,
    devices: Mapping[str, ProfiledDevice] | Iterable[ProfiledDevice] | None = None,
    evaluator: Evaluator | None = None,
    patience_s: float = 180.0,
) -> dict[str, object]:
    """Recalibrate, quantize, write ONNX, verify, measure; returns the manifest.

    Args:
        supernet: trained.
        chosen: a point of a front, or an architecture.
        data: norms and ranges come from its calibration split; the test split is read here, and only here.
        folder: gets ID/model.onnx, ID/manifest.json and ID/card.md.
        devices: whose costs the manifest lists; a device that is this machine is measured. By default this
            machine alone.
        patience_s: how long to wait for a slow phase of this machine to pass.

    Raises ExportFailed when onnxruntime does not agree with torch, or a quantized layer has no integer kernel;
    then nothing is written.
    """
    if devices is None:
        devices = [ProfiledDevice(load_device(DEVICE))]
    devices = list(devices.values()) if isinstance(devices, Mapping) else list(devices)
    evaluator = evaluator or Evaluator(supernet, data)
    architecture = chosen if isinstance(chosen, Architecture) else supernet.space.parse(chosen.architecture)
    deployed = evaluator.deploy(architecture)
    network = deployed.folded.network
    model = write_onnx(
        network,
        deployed.folded.weights(),
        deployed.ranges,
        weight_limit=evaluator.weight_limit,
        metadata={"architecture": str(architecture), "space": supernet.space.name},
    )
    onnx.checker.check_model(model, full_check=True)
    content = bytes(model.SerializeToString())
    kernels = _checked_kernels(content, network)
    parity = _parity(content, deployed, data)
    believed = {**chosen.figures, **chosen.predicted} if isinstance(chosen, Evaluation) else {}
    manifest: dict[str, object] = {
        "schema": SCHEMA,
        "id": architecture.id,
        "key": export_key(evaluator, architecture, devices),
        "space": supernet.space.name,
        "architecture": str(architecture),
        "supernet_sha256": evaluator.supernet_sha256,
        "precisions": network.precisions,
        "int8_macs_share": network.int8_macs_share,
        "integer_kernels": kernels,
        "weight_limit": evaluator.weight_limit,
        "accuracy": {
            "validation": accuracy(deployed.simulated, data, "val_front"),
            "test": parity.pop("test_accuracy"),
            "test_torch": parity.pop("test_accuracy_torch"),
            "test_images": len(data["test"]),
        },
        "parity": parity,
        **_schedule(deployed, data),
        "macs": network.macs,
        "params": network.params,
        "model_bytes": network.model_bytes,
        "file_bytes": len(content),
        "devices": {
            device.name: _device_costs(device, network, content, believed.get(f"latency_ms@{device.name}"), patience_s)
            for device in devices
        },
        "input": {
            "name": "input",
            "shape": ["batch", *network.input_shape],
            "resize": RESIZING,
            "scale": "pixels / 255, then (x - mean) / std for each channel",
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "output": {"name": "logits", "classes": list(data.classes)},
        "versions": versions(),
    }
    return _write(Path(folder), architecture.id, content, manifest)


def export_key(evaluator: Evaluator, architecture: Architecture, devices: Iterable[ProfiledDevice]) -> str:
    """Digest of what a manifest depends on: an export whose key is another is stale."""
    parts = (evaluator.key, str(architecture), sorted((device.name, device.key) for device in devices))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _checked_kernels(content: bytes, network: Network) -> dict[str, str]:
    """The integer kernels of quantized layers; raises ExportFailed when one with weights has none."""
    operators = integer_kernels(content, network)
    kernels = {name: operator for name, operator in operators.items() if operator in INTEGER_OPERATORS}
    quantized = (layer.name for layer in network.layers if layer.has_weights and layer.precision.is_quantized)
    lacking = [f"{name} ({operators.get(name, 'missing')})" for name in quantized if name not in kernels]
    if lacking:
        raise ExportFailed(
            f"onnxruntime {onnxruntime.__version__} does not compute {', '.join(lacking)} on integers; "
            "set their precision to fp32, or use the version this was tested with; nothing was written"
        )
    return kernels


def _parity(content: bytes, deployed: Quantized, data: Data) -> dict[str, float | str | int]:
    """onnxruntime against torch on all test images, which are real and were never seen."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of what it does to a graph, which nobody can act on
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    resolution = resolution_of(deployed.simulated)
    agreed = correct = correct_torch = count = 0
    largest = total = 0.0
    scale = 0.0
    simulated = deployed.simulated.cpu()
    with torch.inference_mode():
        for x, labels in data.batches("test", resolution):
            expected = simulated(x).numpy()
            got = session.run(None, {"input": x.numpy()})[0]
            agreed += int((got.argmax(1) == expected.argmax(1)).sum())
            correct += int((got.argmax(1) == labels.numpy()).sum())
            correct_torch += int((expected.argmax(1) == labels.numpy()).sum())
            difference = np.abs(got - expected)
            largest, total = max(largest, float(difference.max())), total + float(difference.mean()) * len(x)
            scale = max(scale, float(np.abs(expected).max()))
            count += len(x)
    agreement = agreed / count
    if agreement < LEAST_AGREEMENT:
        raise ExportFailed(
            f"onnxruntime and torch agree on {agreement:.2%} of {count} test images; expected {LEAST_AGREEMENT:.0%} "
            "or more; nothing was written"
        )
    return {
        "images": count,
        "split": "test",
        "top1_agreement": agreement,
        "max_abs_difference": largest,
        "mean_abs_difference": total / count,
        "largest_logit": scale,
        "test_accuracy": correct / count,
        "test_accuracy_torch": correct_torch / count,
    }


def _schedule(deployed: Quantized, data: Data) -> dict[str, object]:
    """`patches`: how a device is to run the first layers, which the ONNX model leaves open; nothing without patches.

    Raises ExportFailed when running them so gives other classes than running them whole, on a batch of test images.
    """
    subnet = deployed.simulated.cpu()
    stage = subnet.network.patch_stage
    if not stage:
        return {}
    with torch.inference_mode():
        x, _ = next(iter(data.batches("test", resolution_of(subnet))))
        whole, patched = subnet(x), subnet.in_patches(x)
    agreement = float((whole.argmax(1) == patched.argmax(1)).float().mean())
    if agreement < LEAST_AGREEMENT:
        raise ExportFailed(
            f"running {stage[-1].patches} patches a side up to {stage[-1].name!r} agrees with running whole on "
            f"{agreement:.2%} of {len(x)} test images; expected {LEAST_AGREEMENT:.0%} or more; nothing was written"
        )
    found = {
        "per_side": stage[-1].patches,
        "last_layer": stage[-1].name,
        "macs": executed_macs(subnet.network),
        "macs_clipped": executed_macs(subnet.network, clipped=True),
        "images": len(x),
        "top1_agreement_with_whole": agreement,
        "max_abs_difference_from_whole": float((whole - patched).abs().max()),
    }
    return {"patches": found}


def _device_costs(
    device: ProfiledDevice, network: Network, content: bytes, believed: Figure | None, patience_s: float
) -> dict[str, object]:
    """What a manifest says of one device; `believed` is the latency that a search predicted."""
    illegal = device.profile.illegal_layers(network)
    found: dict[str, object] = {"runtime": device.profile.runtime, "legal": not illegal}
    if illegal:
        return found | {"illegal_layers": list(illegal)}
    if device.profile.planner:
        found |= {name: int(device.figure(network, name).value) for name in ("sram_bytes", "flash_bytes")}
        found["planner"] = device.profile.planner
        found["macs"] = device.profile.macs(network)
        limits = device.memory_limits
        found["fits"] = all(limit.violation(device.figure(network, limit.name)) <= 0 for limit in limits)
    found["latency_ms"] = _latencies(device, network, content, believed, patience_s)
    if device.profile.energy_model is not None and device.has_latency:
        energy = device.figure(network, "energy_uj")
        found |= {"energy_uj": energy.to_dict()} if math.isfinite(energy.value) else {}
    return found


def _latencies(
    device: ProfiledDevice, network: Network, content: bytes, believed: Figure | None, patience_s: float
) -> dict[str, object]:
    """`predicted` and, where the device is at hand, `measured`; or `not_predicted`, `not_measured` with the reason."""
    found: dict[str, object] = {}
    try:
        predicted = device.latency(network)
        found["predicted"] = Figure(predicted.mean_ms, predicted.low_ms, predicted.high_ms, predicted.origin).to_dict()
    except (UnavailableCost, UnsupportedLayer) as error:
        if believed is not None and believed.origin == "predicted":
            found["predicted"] = believed.to_dict()
        else:
            found["not_predicted"] = str(error)
    if device.is_at_hand:
        try:
            found["measured"] = measure({"model": content}, device.profile, patience_s=patience_s)["model"].to_json()
        except NoisyMachine as error:
            log.warning("not measured: %s", error)
            found["not_measured"] = str(error)
    return found


def _write(folder: Path, name: str, content: bytes, manifest: dict[str, object]) -> dict[str, object]:
    """All files of an export appear together, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder))
    try:
        write_bytes(staging / "model.onnx", content)
        write_text(staging / "card.md", card(manifest))
        manifest["files"] = {name: sha256_of(staging / name) for name in ("model.onnx", "card.md")}
        write_json(staging / "manifest.json", manifest)
        staging.chmod(0o755)
        if (folder / name).exists():
            shutil.rmtree(folder / name)
        staging.rename(folder / name)
    finally:
        if staging.exists():
            shutil.rmtree(staging)
    return manifest


def card(manifest: Mapping[str, object]) -> str:
    """What a person wants to know of a model, in Markdown."""
    accuracy, parity, devices = manifest["accuracy"], manifest["parity"], manifest["devices"]
    assert isinstance(accuracy, dict) and isinstance(parity, dict) and isinstance(devices, dict)
    taken = manifest["input"]
    assert isinstance(taken, dict)
    lines = [
        f"# Subnet {manifest['id']}",
        "",
        f"Cut from a supernet of the space `{manifest['space']}`, `{manifest['architecture']}`.",
        "",
        "| figure | value |",
        "|---|---|",
        f"| test accuracy (onnxruntime, {accuracy['test_images']} images) | {accuracy['test']:.2%} |",
        f"| validation accuracy (held out from the search) | {accuracy['validation']:.2%} |",
        f"| top-1 agreement of onnxruntime with torch | {parity['top1_agreement']:.2%} of the test images |",
        f"| largest difference of a logit | {parity['max_abs_difference']:.3g} of {parity['largest_logit']:.3g} |",
        f"| multiply-accumulates | {manifest['macs']:,}, {manifest['int8_macs_share']:.1%} of them in int8 |",
        f"| weights, biases and scales | {manifest['model_bytes']:,} bytes (the file: {manifest['file_bytes']:,}) |",
        "",
        "| device | latency, ms | energy, uJ | SRAM, bytes | flash, bytes |",
        "|---|---|---|---|---|",
        *(_device_row(name, costs) for name, costs in devices.items()),
        "",
        "## Input",
        "",
        f"`input`, float32, shape {taken['shape']}: {taken['scale']}; mean {_rounded(taken['mean'])}, "
        f"std {_rounded(taken['std'])}. Images of another size are resized before: {taken['resize']}.",
        "",
    ]
    return "\n".join(lines)


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(value, 4) for value in values]


def _device_row(name: str, costs: Mapping[str, object]) -> str:
    if not costs["legal"]:
        return f"| {name} | cannot run it: a precision it does not have | | | |"
    latency = costs["latency_ms"]
    assert isinstance(latency, dict)
    believed = latency.get("predicted")
    shown = [f"{believed['value']:.4g} {believed['origin']}"] if believed else []
    if "measured" in latency:
        shown.append(f"{latency['measured']['latency_ms']:.4g} measured ({costs['runtime']})")
    energy = costs.get("energy_uj")
    joules = f"{energy['value']:.4g} {energy['origin']}" if isinstance(energy, dict) else ""
    fits = "" if costs.get("fits", True) else " (does not fit)"
    memory = [f"{costs[key]:,}{fits}" if key in costs else "" for key in ("sram_bytes", "flash_bytes")]
    return f"| {name} | {', '.join(shown) or 'not known'} | {joules} | {memory[0]} | {memory[1]} |"
