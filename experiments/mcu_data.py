"""The published measurements of microcontrollers, and the features of the networks that were measured.

Two tables: TinyEngine's (MIT), eight networks of MCUNet's model zoo with a known structure and four libraries on one
Cortex-M7; and MLPerf Tiny v0.5 to v1.0 (Apache-2.0), four int8 networks on many boards, of which those are read that
have a Cortex-M and no accelerator. The table of MLPerf Tiny leaves some runtimes out; they are in the system
descriptions of the submissions, in the results repositories of those rounds.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tflite_graph import graph_features, read_operators

from hardware_profiles.cost_model import features
from search_spaces import INPUT, INT8, Layer, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

KIB = 1024
H743_TABLE, MLPERF_TABLE = "mcu_stm32h743.csv", "mcu_mlperf_tiny.csv"

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


def has_data(folder: Path) -> bool:
    return (folder / H743_TABLE).is_file() and (folder / MLPERF_TABLE).is_file()


def read_runs(data: Path) -> list[Run]:
    """All measurements of networks with a known structure; what does not fit a device was not measured."""
    return [*_read_h743(data), *_read_mlperf(data)]


def _read_h743(data: Path) -> list[Run]:
    networks = {
        name: zoo_network(json.loads((data / "mcunet" / f"{file}.json").read_text()), resolution)
        for name, (file, resolution, _) in ROWS.items()
    }
    with (data / H743_TABLE).open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["net_id"] in networks and row["latency_ms"]]
    return [
        Run(
            H743_KERNELS[row["library"]],
            H743_BOARDS[row["library"]],
            row["net_id"],
            ROWS[row["net_id"]][2],
            features(networks[row["net_id"]]),
            float(row["latency_ms"]),
            sram_bytes=int(float(row["sram_kB"]) * KIB),
            flash_bytes=int(float(row["flash_kB"]) * KIB),
            network=networks[row["net_id"]],
        )
        for row in rows
    ]


def _read_mlperf(data: Path) -> list[Run]:
    known = {
        task: graph_features(read_operators(data / "mlperf_tiny_models" / file)) for task, file in MLPERF_FILES.items()
    }
    runs = []
    with (data / MLPERF_TABLE).open(newline="") as stream:
        for row in csv.DictReader(stream):
            key = (row["round"], row["submitter"], row["system"])
            if key in MLPERF_BOARDS and row["division"] == "closed":
                kernels, board = MLPERF_BOARDS[key]
                task, energy = row["task"], row["energy_uJ_per_inf"]
                joules = float(energy) if energy else None
                runs.append(Run(kernels, board, task, task, known[task], float(row["latency_ms"]), joules))
    return runs


def boards_of(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each board, in order."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.board, []).append(run)
    return found
