"""Fit the two microcontroller profiles to the TinyEngine rows of the STM32H743 table.

    python experiments/fit_mcu.py DATA_DIR [--write]

DATA_DIR holds mcu_stm32h743.csv, mcu_mlperf_tiny.csv and mcunet/*.json: the measurements published with TinyEngine
(MIT) and the structures of MCUNet's model zoo (MIT). Prints what it found as JSON and writes it to
experiments/results/fit_mcu.json; --write also writes the fitted part of the two device files.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fitted import held_out_section, judged_fit, provenance, rounded, spread, write_device, write_result

from hardware_profiles.cost_model import features
from hardware_profiles.memory import INPLACE_DEPTHWISE, peak_sram_bytes
from search_spaces import INPUT, INT8, Layer, Network
from search_spaces import layers as L
from search_spaces.layers import Port, assemble, port

COMMAND = "python experiments/fit_mcu.py DATA_DIR"
KIB = 1024
H743_MHZ, F746_MHZ = 480, 216

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
COMPUTING = ("conv.int8", "pointwise.int8", "depthwise.int8", "linear.int8")
MOVING = (*COMPUTING, "add.int8", "average_pool.int8")
FREE = ("reshape.int8", "quantize.int8")  # a view; and the image, which these devices are given as integers


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


def read_networks(data: Path) -> tuple[list[str], list[Network], list[dict[str, str]]]:
    """Names, networks and TinyEngine's measurements of the rows with a known structure."""
    with (data / "mcu_stm32h743.csv").open(newline="") as stream:
        table = {row["net_id"]: row for row in csv.DictReader(stream) if row["library"] == "tinyengine"}
    networks = [
        zoo_network(json.loads((data / "mcunet" / f"{file}.json").read_text()), resolution)
        for file, resolution, _ in ROWS.values()
    ]
    return list(ROWS), networks, [table[name] for name in ROWS]


def total(row: Mapping[str, float], prefixes: Sequence[str], quantity: str) -> float:
    return sum(row.get(f"{prefix}.{quantity}", 0.0) for prefix in prefixes)


def fit_latency(networks: Sequence[Network], latency_ms: np.ndarray) -> dict[str, Any]:
    """Two coefficients: a price per MAC and a price per byte of activations read or written."""
    rows = [features(network) for network in networks]
    matrix = np.array([[total(row, COMPUTING, "macs"), total(row, MOVING, "bytes")] for row in rows])
    architectures = [architecture for _, _, architecture in ROWS.values()]
    fold = np.unique(architectures, return_inverse=True)[1]
    macs = np.array([float(network.macs) for network in networks])
    return judged_fit(matrix, macs, latency_ms, fold) | {"folds": len(set(architectures))}


def fit_sram(planned: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """What the runtime needs beyond the planned tensors, as a share of them: the mean over networks."""
    share = measured / planned - 1
    left_out = np.array([np.delete(share, i).mean() for i in range(len(share))])
    error = planned * (1 + left_out) / measured - 1
    return {
        "overhead": rounded(share.mean()),
        "smallest_overhead": rounded(share.min()),
        "largest_overhead": rounded(share.max()),
        "held_out_mape": rounded(np.abs(error).mean()),
        "held_out_max_error": rounded(np.abs(error).max()),
        "mape_without_overhead": rounded(np.abs(planned / measured - 1).mean()),
    }


def fit_flash(parameters: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Bytes of code and tables: the median, since one size does not fit (see the spread)."""
    overhead = measured - parameters
    left_out = np.array([np.median(np.delete(overhead, i)) for i in range(len(overhead))])
    error = (parameters + left_out) / measured - 1
    return {
        "overhead_bytes": round(float(np.median(overhead))),
        "smallest_overhead_bytes": round(float(overhead.min())),
        "largest_overhead_bytes": round(float(overhead.max())),
        "held_out_mape": rounded(np.abs(error).mean()),
        "held_out_max_error": rounded(np.abs(error).max()),
    }


def clock_scaling(data: Path) -> dict[str, Any]:
    """How far latencies scale with the clock alone: MLPerf Tiny v1.0, one runtime on two Cortex-M4 chips.

    It has no TinyEngine on an STM32F746, only another vendor's engine, so nothing there checks the derived profile.
    """
    with (data / "mcu_mlperf_tiny.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["round"] == "v1.0" and "Plumerai" in row["framework"]]
    slow, fast = (
        {row["task"]: float(row["latency_ms"]) for row in rows if row["board"] == board}
        for board in ("Nucleo-L4R5ZI", "CY8CPROTO-062-4343W")
    )
    f746 = sorted({row["framework"] for row in rows if "F746" in row["soc"]})
    return {
        "pair": "Cortex-M4, Plumerai Inference Engine: 120 MHz scaled to 150 MHz, error of the scaled latency",
        "errors": {task: rounded(slow[task] * 120 / 150 / fast[task] - 1) for task in sorted(slow)},
        "runtimes_on_stm32f746": f746,
    }


def fit(data: Path) -> dict[str, Any]:
    names, networks, table = read_networks(data)
    latency_ms = np.array([float(row["latency_ms"]) for row in table])
    sram = np.array([float(row["sram_kB"]) * KIB for row in table])
    flash = np.array([float(row["flash_kB"]) * KIB for row in table])
    planned = np.array([float(peak_sram_bytes(network, INPLACE_DEPTHWISE)) for network in networks])
    parameters = np.array([float(network.model_bytes) for network in networks])
    latency = fit_latency(networks, latency_ms)
    per_mac, per_byte = latency["coefficients"]
    return {
        **provenance(COMMAND),
        "seed": None,
        "networks": [
            {
                "name": name,
                "structure": ROWS[name][0],
                "resolution": ROWS[name][1],
                "macs": network.macs,
                "latency_ms": float(row["latency_ms"]),
                "left_out_ms": rounded(left_out),
                "sram_bytes_measured": int(float(row["sram_kB"]) * KIB),
                "sram_bytes_planned": int(peak),
                "flash_bytes_measured": int(float(row["flash_kB"]) * KIB),
                "parameter_bytes": network.model_bytes,
            }
            for name, network, row, left_out, peak in zip(
                names, networks, table, latency["left_out_ms"], planned, strict=True
            )
        ],
        "without_structure": ["mcunet-vww0", "mcunet-vww1", "mcunet-vww2"],
        "ms_per_mac": rounded(per_mac),
        "ms_per_byte": rounded(per_byte),
        "relative_error": rounded(latency["relative_error"]),
        "held_out": held_out_section(latency, len(networks), latency["folds"]),
        "macs_only": {name: rounded(value) for name, value in latency["macs_only"].items()},
        "sram": fit_sram(planned, sram),
        "flash": fit_flash(parameters, flash),
        "clock_scaling": clock_scaling(data),
    }


def device_sections(result: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """The written part of a device file; a scale other than 1 makes it derived, its error unknown."""
    sram, flash, errors = result["sram"], result["flash"], result["held_out"]
    table = f"the {errors['networks']} TinyEngine networks on an STM32H743 whose structure is published"
    memory = {
        "planner": INPLACE_DEPTHWISE,
        "sram_overhead": {
            "value": sram["overhead"],
            "source": f"mean over {table} (a kB taken as 1024 bytes): {sram['smallest_overhead']:.3f} to "
            f"{sram['largest_overhead']:.3f} of the planned peak; held-out error {sram['held_out_mape']:.1%} "
            "on average",
        },
        "flash_overhead_bytes": {
            "value": flash["overhead_bytes"],
            "source": f"median over {table}: {flash['smallest_overhead_bytes']} to {flash['largest_overhead_bytes']} "
            f"bytes; held-out error of the flash {flash['held_out_mape']:.1%} on average",
        },
    }
    coefficients = spread(COMPUTING, {"macs": result["ms_per_mac"] * scale})
    coefficients |= spread(MOVING, {"bytes": result["ms_per_byte"] * scale})
    coefficients |= spread(FREE, {"count": 0.0})
    smallest, largest = (pick(row["macs"] for row in result["networks"]) for pick in (min, max))
    fitted = f"fitted to {table}, {smallest / 1e6:.1f} to {largest / 1e6:.0f} million MACs"
    latency: dict[str, Any] = {"origin": "fitted", "source": fitted}
    if scale != 1:
        worst = max(abs(error) for error in result["clock_scaling"]["errors"].values())
        latency = {
            "origin": "derived",
            "source": f"the model of stm32h743 times {H743_MHZ}/{F746_MHZ}, the ratio of the clocks; no measurement of "
            "this runtime on this device was at hand, so the error is not known. Scaling one runtime between two "
            f"Cortex-M4 chips by their clocks was wrong by up to {worst:.0%} in MLPerf Tiny v1.0",
        }
    latency |= {"constant_ms": 0.0, "coefficients_ms": coefficients}
    if scale == 1:
        latency |= {"relative_error": result["relative_error"], "held_out": dict(errors)}
    return {"memory": memory, "latency": latency}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, metavar="DATA_DIR", help="folder with the measurements")
    parser.add_argument("--write", action="store_true", help="also write the device files")
    options = parser.parse_args(arguments)
    if not (options.data / "mcu_stm32h743.csv").is_file():
        print(f"{options.data}: expected a folder with mcu_stm32h743.csv and mcunet/", file=sys.stderr)
        return 2
    result = fit(options.data)
    print(json.dumps(result, indent=1))
    write_result("fit_mcu", result)
    if options.write:
        write_device("stm32h743", COMMAND, device_sections(result, 1))
        write_device("stm32f746", COMMAND, device_sections(result, H743_MHZ / F746_MHZ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
