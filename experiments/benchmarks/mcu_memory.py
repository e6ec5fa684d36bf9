"""Memory of networks on microcontrollers: what is computed beside what runtimes report and what was published.

    python experiments/benchmarks/mcu_memory.py --h743 H.csv --structures FOLDER --models FOLDER \\
        [--architecture-columns net_id] [--device-column library] [--memory-columns sram_kB,flash_kB] \\
        [--devices NAME,...]
    python experiments/benchmarks/mcu_memory.py --data DIR

The second is the first with mcu_stm32h743.csv and mcunet/*.json (TinyEngine and MCUNet, MIT) and
mlperf_tiny_models/*.tflite (MLPerf Tiny, Apache-2.0) of that folder. --devices are libraries of the table's device
column: tflite_micro, cmsis_nn, tinyengine; all of them by default. A kB of the table is 1024 bytes. Where the package
tflite-micro is installed, the arenas of eight networks are asked of it; else they stand beside what it said before.

`macs_only_left_out_mape` is the error of the baseline, a line through the MACs, with the same networks left out as in
`left_out_mape`. TinyEngine's profile was fitted to the networks that it is judged on; `macs_only_mape` is a line that
was fitted to them, too. Prints JSON and writes it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from common import about, out_option
from csv_tables import BadInput, as_many, chosen, command, file_options, files_of, listed
from tflite_arena import arena_head_bytes, has_tflite_micro

sys.path.append(str(Path(__file__).parents[1]))  # the modules of the fitting scripts, which are in no package

from mcu_data import H743_COLUMNS, H743_TABLE, MODELS, ROWS, STRUCTURES, H743Columns, zoo_networks

from experiments.measurements import positive, read_rows
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
from predictors.regression import fit_coefficients, predict_left_out, with_constant
from search_spaces import INPUT, INT8, Architecture, Layer, MobileNet, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

NAME = Path(__file__).stem
INPUTS = {
    "h743": (H743_TABLE, "TinyEngine's table"),
    "structures": (STRUCTURES, "the folder of its networks"),
    "models": (MODELS, "the folder of MLPerf Tiny's networks"),
}
LIBRARIES = ("tflite_micro", "cmsis_nn", "tinyengine")
FEWEST = 2  # architectures of a library: one is left out
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


def arenas(models: Path) -> list[dict[str, Any]]:
    """Bytes of activations in TensorFlow Lite Micro's arena: computed, and said by tflite-micro."""
    rows = []
    with TemporaryDirectory() as folder:
        for name, build in NETWORKS.items():
            network, said = build(), ARENA_BYTES[name]
            if has_tflite_micro():
                path = models / FILES[name] if name in FILES else Path(folder) / f"{name}.tflite"
                if name not in FILES:
                    path.write_bytes(write_tflite(network, np.random.default_rng(0)))
                said = arena_head_bytes(path)
            planned = peak_sram_bytes(network, TFLM_GREEDY, explicit_padding=UNLESS_SAME)
            rows.append(
                {"name": name, "macs": network.macs, "planned": planned, "said": said, "equal": planned == said}
            )
    return rows


# files and boards -------------------------------------------------------------------------------------------


def file_sizes(models: Path) -> list[dict[str, Any]]:
    """The four .tflite files beside what is computed for their networks.

    Those with convolutions come from a converter that also kept the observed range of each weight channel (8 bytes),
    and KWS and VWW have long names: what the model of storage leaves out.
    """
    rows = []
    for name, file in FILES.items():
        stored, found = flash_bytes(NETWORKS[name](), storage="tflite"), (models / file).stat().st_size
        rows.append({"name": name, "file_bytes": found, "computed_bytes": stored, "error": _share(stored / found - 1)})
    return rows


@dataclass(frozen=True)
class Measured:
    """Networks of one library, what they are left out by (n,), and their bytes (n,) of SRAM and flash."""

    networks: Mapping[str, Network]
    fold: np.ndarray
    sram: np.ndarray
    flash: np.ndarray

    @property
    def macs_line(self) -> np.ndarray:
        """(n, 2) the MACs and a constant: what the baseline is fitted on."""
        return with_constant(np.array([[float(network.macs)] for network in self.networks.values()]))

    def macs_left_out_mape(self, measured: np.ndarray) -> float:
        return _mape(predict_left_out(self.macs_line, measured, self.fold, ridge=0.0), measured)

    def macs_mape(self, measured: np.ndarray) -> float:
        return _mape(self.macs_line @ fit_coefficients(self.macs_line, measured, ridge=0.0), measured)


def boards(
    table: Path, structures: Path, columns: H743Columns = H743_COLUMNS, libraries: Sequence[str] = ()
) -> dict[str, Any]:
    """SRAM and flash of the networks measured on an STM32H743 whose structures are published, by runtime."""
    rows = read_rows(table, (columns.network, columns.library, columns.sram, columns.flash))
    networks = zoo_networks(structures, (row[columns.network] for row in rows))
    there = {row[columns.library] for row in rows}
    found = {}
    for library in chosen(libraries, [name for name in LIBRARIES if name in there], table):
        own = {row[columns.network]: row for row in rows if row[columns.library] == library and row[columns.sram]}
        names = [name for name in networks if name in own]
        architectures = [ROWS[name][2] for name in names]
        if len(set(architectures)) < FEWEST:
            raise BadInput(
                f"{table}: {library} has {len(set(architectures))} architectures; expected at least {FEWEST}"
            )
        sram, flash = (
            np.array([positive(own[name], column, table) * KIB for name in names])
            for column in (columns.sram, columns.flash)
        )
        fold = np.unique(architectures, return_inverse=True)[1]
        judge = _generated if library == "tinyengine" else _interpreted
        found[library] = judge(Measured({name: networks[name] for name in names}, fold, sram, flash))
    return found


def _interpreted(measured: Measured) -> dict[str, Any]:
    """A .tflite file in an interpreter: what is measured beyond the planned arena, and beyond the parameters.

    Both are lines through the channels and the layers. `free` lets all three coefficients vary; the others keep the
    bytes of a channel that the format says; `left_out` are the errors of networks left out of the fit.
    """
    kept, networks, fold = STORAGES["tflite"], list(measured.networks.values()), measured.fold
    channels = np.array([quantized_channels(network, kept.per_channel) for network in networks], dtype=float)
    layers = np.array([len(network.layers) for network in networks], dtype=float)
    planned = [np.array([_arena(n, padding) for n in networks], dtype=float) for padding in (ALWAYS, NEVER)]
    scales = [SCALE_BYTES * quantized_channels(network, ("conv2d", "linear")) for network in networks]
    parameters = np.array([network.model_bytes for network in networks], dtype=float) - scales
    padded, unpadded = (
        _line(measured.sram, arena, kept.sram_channel_bytes, channels, layers, fold) for arena in planned
    )
    flash = _line(measured.flash, parameters, kept.flash_channel_bytes, channels, layers, fold)
    return {
        "networks": len(networks),
        "architectures": len(set(fold.tolist())),
        "sram": padded | {"macs_only_left_out_mape": measured.macs_left_out_mape(measured.sram)},
        "sram_if_kernels_padded": unpadded,
        "flash": flash | {"macs_only_left_out_mape": measured.macs_left_out_mape(measured.flash)},
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


def _generated(measured: Measured) -> dict[str, Any]:
    """TinyEngine: the shipped profile, which was fitted to these very networks (experiments/fit_mcu.py)."""
    device = load_device("stm32h743")
    rows = [
        {
            "name": name,
            "sram_bytes": int(sram),
            "sram_planned": peak_sram_bytes(network, INPLACE_DEPTHWISE),
            "sram_error": _share(device.sram_bytes(network) / sram - 1),
            "flash_bytes": int(flash),
            "flash_error": _share(device.flash_bytes(network) / flash - 1),
        }
        for (name, network), sram, flash in zip(
            measured.networks.items(), measured.sram.tolist(), measured.flash.tolist(), strict=True
        )
    ]
    found: dict[str, Any] = {"networks": rows}
    for figure, values in (("sram", measured.sram), ("flash", measured.flash)):
        found[f"{figure}_mape"] = _share(np.mean([abs(row[f"{figure}_error"]) for row in rows]))
        found[f"{figure}_macs_only_mape"] = measured.macs_mape(values)
        found[f"{figure}_macs_only_left_out_mape"] = measured.macs_left_out_mape(values)
    return found


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


def benchmark(asked: argparse.Namespace) -> dict[str, Any]:
    files = files_of(asked, INPUTS)
    table, structures, models = (files[name] for name in INPUTS)
    if table is None or structures is None or models is None:
        raise BadInput("expected all of --h743, --structures and --models")
    if lacking := [name for name in FILES.values() if not (models / name).is_file()]:
        raise BadInput(f"{models}: no file {lacking[0]}")
    on_boards = boards(table, structures, columns_of(asked), listed(asked.devices))
    found = arenas(models)
    return {
        **about(),
        "arena_asked_of": f"tflite-micro {version('tflite-micro')}" if has_tflite_micro() else f"{ASKED}, earlier",
        "arenas_equal": f"{sum(row['equal'] for row in found)} of {len(found)}",
        "arenas": found,
        "tflite_files": file_sizes(models),
        "stm32h743": on_boards,
        "mobilenet_v2_224_int8": patched(),
        "planning_ms": seconds_of_planning(),
    }


def columns_of(asked: argparse.Namespace) -> H743Columns:
    network = as_many("--architecture-columns", asked.architecture_columns, [H743_COLUMNS.network])[0]
    sram, flash = as_many("--memory-columns", asked.memory_columns, [H743_COLUMNS.sram, H743_COLUMNS.flash])
    return H743Columns(network, asked.device_column, sram=sram, flash=flash)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    file_options(parser, INPUTS)
    parser.add_argument("--architecture-columns", default=H743_COLUMNS.network, help="the column of the network")
    parser.add_argument("--device-column", default=H743_COLUMNS.library, help="the column of the library")
    parser.add_argument(
        "--memory-columns",
        default=f"{H743_COLUMNS.sram},{H743_COLUMNS.flash}",
        help="the columns of SRAM and flash, in kB",
    )
    parser.add_argument("--devices", help=f"libraries, separated by commas; all by default: {', '.join(LIBRARIES)}")
    out_option(parser, NAME)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return command(NAME, benchmark, parsed(arguments))


if __name__ == "__main__":
    sys.exit(main())
