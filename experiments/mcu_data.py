"""The published measurements of microcontrollers, and the features of the networks that were measured.

Two tables: TinyEngine's (MIT), eight networks of MCUNet's model zoo with a known structure and four libraries on one
Cortex-M7; and MLPerf Tiny v0.5 to v1.0 (Apache-2.0), four int8 networks on many boards, of which those are read that
have a Cortex-M and no accelerator. The table of MLPerf Tiny leaves some runtimes out; they are in the system
descriptions of the submissions, in the results repositories of those rounds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tflite_graph import graph_features, read_operators

from experiments.measurements import BadInput, positive, read_rows
from hardware_profiles.cost_model import features
from search_spaces import INPUT, INT8, Layer, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

KIB = 1024
H743_TABLE, MLPERF_TABLE = "mcu_stm32h743.csv", "mcu_mlperf_tiny.csv"
STRUCTURES, MODELS = "mcunet", "mlperf_tiny_models"

# Row of the table -> (structure, resolution, architecture). The zoo calls in0..in4 by their limits; the three vww
# rows have no structure there. Both proxyless rows are one architecture, and are left out of a fit together. The
# table's w0.3 networks at 64 pixels are taken from the zoo's structures for 176 and 80 pixels.
ROWS = {
    "mcunet-in0": ("mcunet-10fps_imagenet", 48, "in0"),
    "mcunet-in1": ("mcunet-5fps_imagenet", 96, "in1"),
    "mcunet-in2": ("mcunet-256kb-1mb_imagenet", 160, "in2"),
    "mcunet-in3": ("mcunet-320kb-1mb_imagenet", 176, "in3"),
    "mcunet-in4": ("mcunet-512kb-2mb_imagenet", 160, "in4"),
    "proxyless-w0.3-r64": ("proxyless-w0.3-r176_imagenet", 64, "proxyless"),
    "proxyless-w0.3-r176": ("proxyless-w0.3-r176_imagenet", 176, "proxyless"),
    "mbv2-w0.3-r64": ("mbv2-w0.3-r80_imagenet", 64, "mbv2"),
}
MLPERF_FILES = {
    "ad": "ad01_int8.tflite",
    "ic": "pretrainedResnet_quant.tflite",
    "kws": "kws_ref_model.tflite",
    "vww": "vww_96_int8.tflite",
}

# library of the first table -> kernels, which all boards share whose cost ratios are fitted together
H743_KERNELS = {
    "tflite_micro": "tflm-reference",
    "cmsis_nn": "cmsis-nn",
    "x_cube_ai_7_3": "x-cube-ai-7",
    "tinyengine": "tinyengine",
}
# (round, submitter, system) of the second table -> kernels, board
MLPERF_BOARDS = {
    ("v0.5", "reference", "Nucleo-L4R5ZI"): ("tflm-2.3.1", "stm32l4r5 TFLM 2.3.1"),
    ("v0.7", "STMicroelectronics", "NUCLEO_L4R5ZI"): ("x-cube-ai-7", "stm32l4r5 X-CUBE-AI 7.1.0"),
    ("v0.7", "STMicroelectronics", "NUCLEO-U575ZI-Q"): ("x-cube-ai-7", "stm32u575 X-CUBE-AI 7.1.0"),
    ("v0.7", "STMicroelectronics", "NUCLEO-H7A3ZI-Q"): ("x-cube-ai-7", "stm32h7a3 X-CUBE-AI 7.1.0"),
    ("v0.7", "plumerai", "NUCLEO_L4R5ZI"): ("plumerai", "stm32l4r5 Plumerai v0.7"),
    ("v0.7", "plumerai", "DISCO_F746NG"): ("plumerai", "stm32f746 Plumerai v0.7"),
    ("v0.7", "plumerai", "cy8cproto_062_4343w"): ("plumerai", "psoc62 Plumerai v0.7"),
    ("v0.7", "renesas", "EK-RA6M4"): ("cmsis-nn", "ra6m4 TFLM with CMSIS"),
    ("v1.0", "OctoML", "microtvm_cmsis_nn/NUCLEO_L4R5ZI"): ("cmsis-nn", "stm32l4r5 microTVM with CMSIS-NN"),
    ("v1.0", "OctoML", "microtvm_cmsis_nn/NRF5340-DK"): ("cmsis-nn", "nrf5340 microTVM with CMSIS-NN"),
    ("v1.0", "OctoML", "microtvm_native/NUCLEO_L4R5ZI"): ("microtvm", "stm32l4r5 microTVM"),
    ("v1.0", "STMicroelectronics", "NUCLEO_L4R5ZI"): ("x-cube-ai-7", "stm32l4r5 X-CUBE-AI 7.3.0"),
    ("v1.0", "STMicroelectronics", "NUCLEO-U575ZI-Q"): ("x-cube-ai-7", "stm32u575 X-CUBE-AI 7.3.0"),
    ("v1.0", "STMicroelectronics", "NUCLEO-H7A3ZI-Q"): ("x-cube-ai-7", "stm32h7a3 X-CUBE-AI 7.3.0"),
    ("v1.0", "plumerai", "NUCLEO_L4R5ZI"): ("plumerai", "stm32l4r5 Plumerai v1.0"),
    ("v1.0", "plumerai", "DISCO_F746NG"): ("plumerai", "stm32f746 Plumerai v1.0"),
    ("v1.0", "plumerai", "cy8cproto_062_4343w"): ("plumerai", "psoc62 Plumerai v1.0"),
    ("v1.0", "plumerai", "B_U585I_IOT02A"): ("plumerai", "stm32u585 Plumerai v1.0"),
}
H743_BOARDS = {
    "tflite_micro": "stm32h743 TFLM",
    "cmsis_nn": "stm32h743 TFLM with CMSIS-NN",
    "x_cube_ai_7_3": "stm32h743 X-CUBE-AI 7.3",
    "tinyengine": "stm32h743 TinyEngine",
}


@dataclass(frozen=True, slots=True)
class H743Columns:
    """The columns of TinyEngine's table; those of memory are read where they are there."""

    network: str = "net_id"
    library: str = "library"
    latency: str = "latency_ms"
    sram: str = "sram_kB"
    flash: str = "flash_kB"


@dataclass(frozen=True, slots=True)
class MlperfColumns:
    """The columns of MLPerf Tiny's table; `board` are those of the round, submitter and system, as in `MLPERF_BOARDS`.

    Energy is read where it is there.
    """

    task: str = "task"
    board: tuple[str, str, str] = ("round", "submitter", "system")
    latency: str = "latency_ms"
    energy: str = "energy_uJ_per_inf"


H743_COLUMNS, MLPERF_COLUMNS = H743Columns(), MlperfColumns()


@dataclass(frozen=True, slots=True)
class Run:
    """One network measured on one board with one runtime.

    kernels: whose kernels ran; boards of the same kernels share a model.
    architecture: what is left out of a fit together; two rows may be one architecture at two resolutions.
    features: as `cost_model.features`; network: where the structure is one of ours, for the memory planners.
    """

    kernels: str
    board: str
    name: str
    architecture: str
    features: Mapping[str, float]
    latency_ms: float
    energy_uj: float | None = None
    sram_bytes: int | None = None
    flash_bytes: int | None = None
    network: Network | None = None

    @property
    def macs(self) -> float:
        return sum(amount for name, amount in self.features.items() if name.endswith(".macs"))


def zoo_network(structure: Mapping[str, Any], resolution: int) -> Network:
    """An int8 network from one of MCUNet's JSON files: stem, inverted residual blocks, head, classifier."""
    made: list[Layer] = []

    def conv(name: str, source: Port, width: int, **options: Any) -> Port:
        made.append(L.conv2d(name, source, width, precision=INT8, **options))
        return port(made[-1])

    stem = structure["first_conv"]
    image = Port(INPUT, (stem["in_channels"], resolution, resolution))
    tensor = conv(
        "stem", image, stem["out_channels"], kernel=stem["kernel_size"], stride=stem["stride"], activation="relu6"
    )
    for index, block in enumerate(structure["blocks"]):
        body, source = block["mobile_inverted_conv"], tensor
        if body["name"] == "ZeroLayer":  # nothing but its shortcut
            continue
        hidden = body.get("mid_channels") or round(body["in_channels"] * body["expand_ratio"])
        if body["expand_ratio"] != 1:
            tensor = conv(f"block{index}.expand", tensor, hidden, activation="relu6")
        tensor = conv(
            f"block{index}.depthwise",
            tensor,
            hidden,
            kernel=body["kernel_size"],
            stride=body["stride"],
            groups=hidden,
            activation="relu6",
        )
        tensor = conv(f"block{index}.project", tensor, body["out_channels"])
        if block["shortcut"]:
            made.append(L.add(f"block{index}.add", tensor, source))
            tensor = port(made[-1])
    if structure["feature_mix_layer"]:
        tensor = conv("head", tensor, structure["feature_mix_layer"]["out_channels"], activation="relu6")
    pool = L.global_average_pool("pool", tensor)
    flat = L.reshape("flatten", port(pool), (tensor.shape[0],))
    classifier = L.linear("classifier", port(flat), structure["classifier"]["out_features"], precision=INT8)
    return assemble(image.shape, [(*made, pool, flat, classifier)])


def zoo_networks(structures: Path, names: Iterable[str]) -> dict[str, Network]:
    """Networks of `ROWS` by their names, in the order of `ROWS`; raises BadInput."""
    wanted = set(names)
    found = {}
    for name, (file, resolution, _) in ROWS.items():
        if name in wanted:
            path = structures / f"{file}.json"
            try:
                found[name] = zoo_network(json.loads(path.read_text(encoding="utf-8")), resolution)
            except (OSError, ValueError, LookupError, TypeError) as error:
                raise BadInput(f"{path}: the structure of {name} cannot be used ({error})") from None
    return found


def read_runs(data: Path) -> list[Run]:
    """All measurements of networks with a known structure, by the names that the files have in a folder."""
    return [*read_h743(data / H743_TABLE, data / STRUCTURES), *read_mlperf(data / MLPERF_TABLE, data / MODELS)]


def read_h743(table: Path, structures: Path, columns: H743Columns = H743_COLUMNS) -> list[Run]:
    """Networks of `ROWS` with known libraries; what does not fit the device was not measured. Raises BadInput."""
    rows = [
        row
        for row in read_rows(table, (columns.network, columns.library, columns.latency))
        if row[columns.library] in H743_KERNELS and row[columns.latency]
    ]
    networks = zoo_networks(structures, (row[columns.network] for row in rows))
    return [
        Run(
            H743_KERNELS[row[columns.library]],
            H743_BOARDS[row[columns.library]],
            row[columns.network],
            ROWS[row[columns.network]][2],
            features(networks[row[columns.network]]),
            positive(row, columns.latency, table),
            sram_bytes=_bytes(row, columns.sram, table),
            flash_bytes=_bytes(row, columns.flash, table),
            network=networks[row[columns.network]],
        )
        for row in rows
        if row[columns.network] in networks
    ]


def _bytes(row: Mapping[str, str], column: str, table: Path) -> int | None:
    return int(positive(row, column, table) * KIB) if row.get(column) else None


def read_mlperf(table: Path, models: Path, columns: MlperfColumns = MLPERF_COLUMNS) -> list[Run]:
    """The closed division on the boards of `MLPERF_BOARDS`; raises BadInput."""
    known: dict[str, dict[str, float]] = {}
    runs = []
    for row in read_rows(table, (columns.task, *columns.board, columns.latency)):
        place = MLPERF_BOARDS.get(tuple(row[name] for name in columns.board))
        if place is None or row.get("division", "closed") != "closed" or not row[columns.latency]:
            continue
        kernels, board = place
        task = row[columns.task]
        if task not in known:
            known[task] = _model_features(models, task, table)
        energy = positive(row, columns.energy, table) if row.get(columns.energy) else None
        runs.append(Run(kernels, board, task, task, known[task], positive(row, columns.latency, table), energy))
    return runs


def _model_features(models: Path, task: str, table: Path) -> dict[str, float]:
    if task not in MLPERF_FILES:
        raise BadInput(f"{table}: no task {task!r}; tasks are {', '.join(MLPERF_FILES)}")
    path = models / MLPERF_FILES[task]
    try:
        return graph_features(read_operators(path))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: the model of {task} cannot be used ({error})") from None


def boards_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each board, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.board, []).append(run)
    return found
