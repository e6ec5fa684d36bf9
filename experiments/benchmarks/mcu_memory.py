"""Memory of networks on microcontrollers: what is computed beside what runtimes report and what was published.

    python experiments/benchmarks/mcu_memory.py DATA_DIR [--out FILE.json]

DATA_DIR holds mcu_stm32h743.csv and mcunet/*.json (TinyEngine and MCUNet, MIT) and mlperf_tiny_models/*.tflite
(MLPerf Tiny, Apache-2.0). Where the package tflite-micro is installed, the arenas of eight networks are asked of it;
else they stand beside what it said before. Prints JSON and writes it.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import about, finish, out_option
from tflite_arena import arena_head_bytes, has_tflite_micro

from hardware_profiles import load_device
from hardware_profiles.memory import (
    ALWAYS,
    INPLACE_DEPTHWISE,
    INPLACE_RESIDUAL,
    NEVER,
    PLANNERS,
    SCALE_BYTES,
    STORAGES,
    TFLM_GREEDY,
    UNLESS_SAME,
    flash_bytes,
    peak_sram_bytes,
    quantized_channels,
)
from hardware_profiles.patches import executed_macs, patch_sides, stage_macs
from hardware_profiles.tflite_writer import write_tflite
from search_spaces import INPUT, INT8, Architecture, Layer, MobileNet, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

KIB = 1024
ASKED = "tflite-micro 0.dev20261023182759"  # of which the arenas below were asked
ARENA_BYTES: Mapping[str, int] = {
    "AD": 768,
    "KWS": 16000,
    "IC": 49152,
    "VWW": 73728,
    "32_0.5": 104640,
    "32_1.0": 209280,
    "96_0.35": 230592,
    "96_1.0": 461184,
}
FILES: Mapping[str, str] = {
    "AD": "ad01_int8.tflite",
    "KWS": "kws_ref_model.tflite",
    "IC": "pretrainedResnet_quant.tflite",
    "VWW": "vww_96_int8.tflite",
}


# the eight networks -----------------------------------------------------------------------------------------


def anomaly_detection() -> Network:
    """MLPerf Tiny's autoencoder of ten linear layers, for machine sounds."""
    made: list[Layer] = []
    tensor = Port(INPUT, (640,))
    for index, width in enumerate((128, 128, 128, 128, 8, 128, 128, 128, 128, 640)):
        made.append(L.linear(f"linear{index}", tensor, width, activation="relu" if index < 9 else "", precision=INT8))
        tensor = port(made[-1])
    return assemble((640,), [tuple(made)])


def keyword_spotting() -> Network:
    """MLPerf Tiny's DS-CNN, without its softmax.

    The first convolution has a kernel of 10x4 on one channel. It is written as a 1x1 convolution of the 40 values that
    it sees: with the same weights, work and output. No buffer is largest there.
    """
    image = Port(INPUT, (40, 25, 5))
    made = [_conv("stem", image, 64)]
    for index in range(4):
        made.append(_depthwise(f"depthwise{index}", made[-1]))
        made.append(_conv(f"pointwise{index}", port(made[-1]), 64))
    return assemble(image.shape, [(*made, *_classifier(made[-1], 12))])


def image_classification() -> Network:
    """MLPerf Tiny's ResNet for CIFAR-10, without its softmax."""
    image = Port(INPUT, (3, 32, 32))
    made = [_conv("stem", image, 16, kernel=3)]
    for index, (width, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
        source = port(made[-1])
        made.append(_conv(f"block{index}.first", source, width, kernel=3, stride=stride))
        made.append(_conv(f"block{index}.second", port(made[-1]), width, kernel=3))
        second = port(made[-1])
        if stride > 1:
            made.append(_conv(f"block{index}.shortcut", source, width, stride=stride))
            source = port(made[-1])
        made.append(L.add(f"block{index}.add", source, second))
    return assemble(image.shape, [(*made, *_classifier(made[-1], 10))])


def visual_wake_words() -> Network:
    """MLPerf Tiny's MobileNetV1 of width 0.25, without its softmax."""
    image = Port(INPUT, (3, 96, 96))
    made = [_conv("stem", image, 8, kernel=3, stride=2)]
    blocks = ((16, 1), (32, 2), (32, 1), (64, 2), (64, 1), (128, 2), *[(128, 1)] * 5, (256, 2), (256, 1))
    for index, (width, stride) in enumerate(blocks):
        made.append(_depthwise(f"depthwise{index}", made[-1], stride))
        made.append(_conv(f"pointwise{index}", port(made[-1]), width))
    return assemble(image.shape, [(*made, *_classifier(made[-1], 2))])


def _conv(name: str, source: Port, width: int, *, kernel: int = 1, stride: int = 1) -> Layer:
    return L.conv2d(
        name, source, width, kernel=kernel, stride=stride, padding="same", activation="relu", precision=INT8
    )


def _depthwise(name: str, source: Layer, stride: int = 1) -> Layer:
    channels = source.out_shape[0]
    return L.conv2d(
        name, port(source), channels, kernel=3, stride=stride, groups=channels, padding="same", precision=INT8
    )


def _classifier(last: Layer, classes: int) -> tuple[Layer, ...]:
    pool = L.global_average_pool("pool", port(last))
    flat = L.reshape("flatten", port(pool), (last.out_shape[0],))
    return pool, flat, L.linear("classifier", port(flat), classes, precision=INT8)


def mobilenet(resolution: int, width: float) -> Network:
    """A network like MobileNetV2 with PyTorch's padding: its stem keeps 32 pixels a side and halves more.

    Its largest buffers are the first expanded map and the padded copy of it.
    """
    space = MobileNet(
        resolutions=(resolution,),
        widths=(16, 24, 40, 80),
        width_multipliers=(width,),
        depths=(1, 2),
        kernels=(3,),
        expansions=(1, 6),
        precisions=("int8",),
        strides=(1, 2, 2, 2),
        stem_width=16,
        stem_stride=1 if resolution == 32 else 2,
    )
    values: dict[str, Any] = {"stage1.depth": 1, "stage1.block0.expansion": 1}
    for stage in range(2, 5):
        values |= {f"stage{stage}.depth": 2, f"stage{stage}.block0.expansion": 6, f"stage{stage}.block1.expansion": 6}
    return space.lower(space.build(values))


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "AD": anomaly_detection,
    "KWS": keyword_spotting,
    "IC": image_classification,
    "VWW": visual_wake_words,
    "32_0.5": lambda: mobilenet(32, 0.5),
    "32_1.0": lambda: mobilenet(32, 1.0),
    "96_0.35": lambda: mobilenet(96, 0.35),
    "96_1.0": lambda: mobilenet(96, 1.0),
}


def arenas(data: Path) -> list[dict[str, Any]]:
    """Bytes of activations in TensorFlow Lite Micro's arena: computed, and said by tflite-micro."""
    rows = []
    with TemporaryDirectory() as folder:
        for name, build in NETWORKS.items():
            network, said = build(), ARENA_BYTES[name]
            if has_tflite_micro():
                path = data / "mlperf_tiny_models" / FILES[name] if name in FILES else Path(folder) / f"{name}.tflite"
                if name not in FILES:
                    path.write_bytes(write_tflite(network, np.random.default_rng(0)))
                said = arena_head_bytes(path)
            planned = peak_sram_bytes(network, TFLM_GREEDY, explicit_padding=UNLESS_SAME)
            rows.append(
                {"name": name, "macs": network.macs, "planned": planned, "said": said, "equal": planned == said}
            )
    return rows


# files and boards -------------------------------------------------------------------------------------------


def file_sizes(data: Path) -> list[dict[str, Any]]:
    """The four .tflite files beside what is computed for their networks.

    Those with convolutions come from a converter that also kept the observed range of each weight channel (8 bytes),
    and KWS and VWW have long names: what the model of storage leaves out.
    """
    rows = []
    for name, file in FILES.items():
        stored, found = (
            flash_bytes(NETWORKS[name](), storage="tflite"),
            (data / "mlperf_tiny_models" / file).stat().st_size,
        )
        rows.append({"name": name, "file_bytes": found, "computed_bytes": stored, "error": _share(stored / found - 1)})
    return rows


def boards(data: Path) -> dict[str, Any]:
    """SRAM and flash of the networks measured on an STM32H743 whose structures are published, by runtime."""
    sys.path.append(str(Path(__file__).parents[1]))
    from mcu_data import ROWS, zoo_network

    with (data / "mcu_stm32h743.csv").open(newline="") as stream:
        table = {(row["net_id"], row["library"]): row for row in csv.DictReader(stream)}
    networks = {
        name: zoo_network(json.loads((data / "mcunet" / f"{file}.json").read_text()), resolution)
        for name, (file, resolution, _) in ROWS.items()
    }
    found = {}
    for library in ("tflite_micro", "cmsis_nn"):
        measured = [name for name in networks if table[name, library]["sram_kB"]]
        sram, flash = (
            np.array([float(table[name, library][column]) * KIB for name in measured])
            for column in ("sram_kB", "flash_kB")
        )
        fold = np.unique([ROWS[name][2] for name in measured], return_inverse=True)[1]  # by architecture
        found[library] = _interpreted([networks[name] for name in measured], fold, sram, flash)
    found["tinyengine"] = _generated(networks, {name: table[name, "tinyengine"] for name in networks})
    return found


def _interpreted(networks: Sequence[Network], fold: np.ndarray, sram: np.ndarray, flash: np.ndarray) -> dict[str, Any]:
    """A .tflite file in an interpreter: what is measured beyond the planned arena, and beyond the parameters.

    Both are lines through the channels and the layers. `free` lets all three coefficients vary; the others keep the
    bytes of a channel that the format says; `left_out` are the errors of networks left out of the fit.
    """
    kept = STORAGES["tflite"]
    channels = np.array([quantized_channels(network, kept.per_channel) for network in networks], dtype=float)
    layers = np.array([len(network.layers) for network in networks], dtype=float)
    planned = [np.array([_arena(n, padding) for n in networks], dtype=float) for padding in (ALWAYS, NEVER)]
    scales = [SCALE_BYTES * quantized_channels(network, ("conv2d", "linear")) for network in networks]
    parameters = np.array([network.model_bytes for network in networks], dtype=float) - scales
    padded, unpadded = (_line(sram, arena, kept.sram_channel_bytes, channels, layers, fold) for arena in planned)
    return {
        "networks": len(networks),
        "architectures": len(set(fold.tolist())),
        "sram": padded,
        "sram_if_kernels_padded": unpadded,
        "flash": _line(flash, parameters, kept.flash_channel_bytes, channels, layers, fold),
    }


def _arena(network: Network, explicit_padding: str) -> int:
    return peak_sram_bytes(network, TFLM_GREEDY, explicit_padding=explicit_padding)


def _line(
    measured: np.ndarray,
    known: np.ndarray,
    channel_bytes: int,
    channels: np.ndarray,
    layers: np.ndarray,
    fold: np.ndarray,
) -> dict[str, Any]:
    ones = np.ones_like(layers)
    free = np.linalg.lstsq(np.stack([channels, layers, ones], axis=1), measured - known, rcond=None)[0]
    matrix, target = np.stack([layers, ones], axis=1), measured - known - channel_bytes * channels
    fitted = np.linalg.lstsq(matrix, target, rcond=None)[0]
    left_out = np.empty_like(target)
    for index in range(len(target)):
        others = fold != fold[index]
        left_out[index] = matrix[index] @ np.linalg.lstsq(matrix[others], target[others], rcond=None)[0]
    predicted = known + channel_bytes * channels + left_out
    return {
        "free": dict(
            zip(("channel_bytes", "layer_bytes", "fixed_bytes"), (round(float(x), 2) for x in free), strict=True)
        ),
        "channel_bytes": channel_bytes,
        "layer_bytes": round(float(fitted[0]), 1),
        "fixed_bytes": round(float(fitted[1])),
        "left_out_mape": _mape(predicted, measured),
        "left_out_max_error": _share(np.abs(predicted / measured - 1).max()),
    }


def _generated(networks: Mapping[str, Network], rows: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """TinyEngine: the shipped profile, which was fitted to these very networks (experiments/fit_mcu.py)."""
    device = load_device("stm32h743")
    listed = [
        {
            "name": name,
            "sram_bytes": int(float(rows[name]["sram_kB"]) * KIB),
            "sram_planned": peak_sram_bytes(network, INPLACE_DEPTHWISE),
            "sram_error": _share(device.sram_bytes(network) / (float(rows[name]["sram_kB"]) * KIB) - 1),
            "flash_bytes": int(float(rows[name]["flash_kB"]) * KIB),
            "flash_error": _share(device.flash_bytes(network) / (float(rows[name]["flash_kB"]) * KIB) - 1),
        }
        for name, network in networks.items()
    ]
    errors = {figure: np.mean([abs(row[f"{figure}_error"]) for row in listed]) for figure in ("sram", "flash")}
    return {"networks": listed, **{f"{figure}_mape": _share(error) for figure, error in errors.items()}}


def _mape(predicted: np.ndarray, measured: np.ndarray) -> float:
    return _share(np.abs(predicted / measured - 1).mean())


def _share(value: float) -> float:
    return round(float(value), 5)


# patches ----------------------------------------------------------------------------------------------------


def mobilenet_v2() -> tuple[MobileNet, Architecture]:
    """MobileNetV2 (arXiv 1801.04381) at 224 pixels in int8, and in 4x4 patches up to the map of 28x28."""
    repeats, expanded = (1, 2, 3, 4, 3, 3, 1), (1, 6, 6, 6, 6, 6, 6)
    space = MobileNet(
        resolutions=(224,),
        classes=1000,
        widths=(16, 24, 32, 64, 96, 160, 320),
        width_multipliers=(1,),
        depths=(1, 2, 3, 4),
        kernels=(3,),
        expansions=(1, 6),
        precisions=("int8",),
        strides=(1, 2, 2, 2, 1, 2, 1),
        stem_width=32,
        head_width=1280,
        patches=(1, 4),
        patch_stages=(3,),
    )
    values: dict[str, Any] = {"patches": 4}
    for stage, (count, expansion) in enumerate(zip(repeats, expanded, strict=True), start=1):
        values[f"stage{stage}.depth"] = count
        values |= {f"stage{stage}.block{index}.expansion": expansion for index in range(count)}
    return space, space.build(values)


def patched() -> dict[str, Any]:
    """MobileNetV2 whole and in patches; MCUNetV2 (arXiv 2110.15352) publishes 1372 and 172 KiB, 75, 42 %, 10 %."""
    space, architecture = mobilenet_v2()
    network, whole = space.lower(architecture), space.lower(space.unpatched(architecture))
    last = network.patch_stage[-1]
    stage = sum(layer.macs for layer in network.patch_stage)
    return {
        "stage_ends_with": last.name,
        "stage_map": last.out_shape,
        "patch_side": patch_sides(network)[INPUT][0],
        "macs": whole.macs,
        "stage_overhead": {
            name: _share(stage_macs(network, clipped=clipped) / stage - 1)
            for name, clipped in (("unclipped", False), ("clipped", True))
        },
        "total_overhead": {
            name: _share(executed_macs(network, clipped=clipped) / whole.macs - 1)
            for name, clipped in (("unclipped", False), ("clipped", True))
        },
        "peak_kib": {
            planner: {name: peak_sram_bytes(n, planner) / KIB for name, n in (("whole", whole), ("patches", network))}
            for planner in (INPLACE_DEPTHWISE, INPLACE_RESIDUAL)
        },
    }


def seconds_of_planning() -> dict[str, Any]:
    """Milliseconds for one network of 20 blocks, median of 50."""
    space = MobileNet(
        resolutions=(224,), depths=(5,), expansions=(6,), precisions=("int8",), patches=(1, 4), patch_stages=(2,)
    )
    found: dict[str, Any] = {"blocks": 20, "layers": len(space.lower(space.largest).layers)}
    for name, values in (("whole", {"patches": 1}), ("patches", {"patches": 4})):
        network = space.lower(space.build(values))
        found[name] = {planner: round(1e3 * _median_seconds(network, planner), 4) for planner in PLANNERS}
    return found


def _median_seconds(network: Network, planner: str) -> float:
    times = []
    for _ in range(50):
        start = time.perf_counter()
        peak_sram_bytes(network, planner, explicit_padding=UNLESS_SAME)
        times.append(time.perf_counter() - start)
    return median(times)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with the measurements")
    out_option(parser, "mcu_memory")
    options = parser.parse_args(arguments)
    if not (options.data / "mcu_stm32h743.csv").is_file():
        print(
            f"{options.data}: expected a folder with mcu_stm32h743.csv, mcunet/ and mlperf_tiny_models/",
            file=sys.stderr,
        )
        return 2
    found = arenas(options.data)
    result = {
        **about(),
        "arena_asked_of": f"tflite-micro {version('tflite-micro')}" if has_tflite_micro() else f"{ASKED}, earlier",
        "arenas_equal": f"{sum(row['equal'] for row in found)} of {len(found)}",
        "arenas": found,
        "tflite_files": file_sizes(options.data),
        "stm32h743": boards(options.data),
        "mobilenet_v2_224_int8": patched(),
        "planning_ms": seconds_of_planning(),
    }
    finish(result, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
