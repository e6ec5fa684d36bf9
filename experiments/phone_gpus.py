"""Phone and board GPUs in ncnn's benchmark: which runs can be used, and what of a network they are told by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.measurements import BadInput, positive, read_rows
from experiments.ncnn_graphs import INPUT_OF, graph_features, read_graph
from experiments.prices import Price, priced
from predictors.regression import spearman_rho

TABLE = "ncnn_phone_latency.csv.gz"
GRAPHS = "ncnn_param"
VULKAN, FLOATS = "gpu_vulkan", "fp"  # in the table's columns `backend` and `precision`


@dataclass(frozen=True, slots=True)
class PhoneColumns:
    """The columns of a table of latencies: the network, whose graph is a file of that name, the device, the time."""

    model: str = "model"
    device: str = "device"
    latency: str = "min_ms"


COLUMNS = PhoneColumns()


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU of the table: the name of its profile, what to call it, and what its rows' `device` contains."""

    name: str
    title: str
    pattern: str


# Every Adreno and Mali in the table. Where the table names the chip only, the GPU is that of the chip.
GPUS = (
    Gpu("adreno430", "Adreno 430 (phone GPU of the Snapdragon 810)", "Snapdragon 810"),
    Gpu("adreno512", "Adreno 512 (phone GPU of the Snapdragon 660)", "Adreno 512"),
    Gpu("adreno540", "Adreno 540 (phone GPU of the Snapdragon 835)", "Adreno 540"),
    Gpu("adreno620", "Adreno 620 (phone GPU of the Snapdragon 765G)", "Adreno 620"),
    Gpu("adreno740", "Adreno 740 (phone GPU of the Snapdragon 8 Gen 2)", "Adreno 740"),
    Gpu("mali-t764", "Mali-T764 (GPU of the RK3288)", "Rockchip RK3288-CG.W"),
    Gpu("mali-t860", "Mali-T860 (GPU of the RK3399)", "Rockchip RK3399 (Cortex-A72 1.8GHz x 2"),
    Gpu("mali-g52", "Mali-G52 (GPU of the RK3566)", "Mali-G52"),
    Gpu("mali-g72", "Mali-G72 (phone GPU of the Kirin 970)", "Kirin 970"),
    Gpu("mali-g610", "Mali-G610 (GPU of the RK3588)", "Rockchip RK3588 (Cortex-A76 2.4GHz x 4"),
    Gpu("mali-g610-rk3588s", "Mali-G610 (GPU of the RK3588S)", "Mali-G610"),
    Gpu("mali-g720", "Mali-G720 (phone GPU of the Dimensity 9300)", "Mali-G720"),
)

# A run is not used where its latencies hardly follow the MACs, over networks from 30 to 15,000 million of them, or
# where half of its networks vary by more than that between repetitions.
LOWEST_SPEARMAN = 0.6
LARGEST_SPREAD = 1.25  # average over minimum
REPETITIONS = ("avg_ms", "min_ms")  # the columns of both; a table without them does not tell how runs vary
FEWEST_NETWORKS = 3  # of a GPU, so that one is left to fit with two left out
# One network only has these operators, so its prices could not be told on a network left out.
LEFT_OUT = {"vision_transformer": "the only network with attention, layer norms and GELU"}

WEIGHTED = ("conv", "pointwise", "depthwise", "grouped", "linear", "DeconvolutionDepthWise")
ACTIVATIONS = ("relu", "hardswish", "hardsigmoid", "Swish", "Sigmoid")
POOLS = ("average_pool", "max_pool")
MOVING = ("reshape", "permute", "Concat", "Slice", "Crop", "ShuffleChannel", "PriorBox", "Padding")
DETECTION = ("DetectionOutput", "YoloDetectionOutput", "Yolov3DetectionOutput")
OTHER = ("add", "multiply", "softmax", "LRN", "BatchNorm", "Interp", *DETECTION)
PRICES = (
    Price("weighted kernel", WEIGHTED, "count"),
    Price("activation kernel", ACTIVATIONS, "count"),
    Price("pool kernel", POOLS, "count"),
    Price("moving kernel", MOVING, "count"),
    Price("other kernel", OTHER, "count"),
    Price("byte of a weighted kernel", WEIGHTED, "bytes"),
    Price("byte of another kernel", (*ACTIVATIONS, *POOLS, *MOVING, *OTHER), "bytes"),
    Price("byte of weights", WEIGHTED, "weight_bytes"),
    Price("mac", ("conv", "linear"), "macs"),
    Price("mac without fast algorithm", ("conv",), "direct_macs"),
    Price("pointwise mac", ("pointwise",), "macs"),
    Price("depthwise mac", ("depthwise", "DeconvolutionDepthWise"), "macs"),
    Price("grouped mac", ("grouped",), "macs"),
    Price("length of a sum", WEIGHTED, "reduction"),
)


def seven_features(row: Mapping[str, float]) -> np.ndarray:
    """A plain additive model (7,): constant, operators, MACs dense, 1x1, depthwise, bytes of activations, weights."""
    sums = dict.fromkeys(("count", "dense", "pointwise", "depthwise", "bytes", "weight_bytes"), 0.0)
    for feature, amount in row.items():
        family, _, quantity = feature.split(".")
        if quantity == "macs":
            sums[family if family in ("pointwise", "depthwise") else "dense"] += amount
        elif quantity in sums:
            sums[quantity] += amount
    return np.array([1.0, *sums.values()])


def total_macs(row: Mapping[str, float]) -> float:
    return sum(amount for feature, amount in row.items() if feature.endswith(".macs"))


@dataclass(frozen=True)
class PhoneTable:
    """Networks and what the usable GPUs take for them.

    names: n networks of floats; rows: their features; gpus: k GPUs; latency_ms (k, n), the fastest repetition, NaN
    where a GPU did not run a network; judged: what the rule saw of each GPU of the table, kept or not.
    """

    names: tuple[str, ...]
    rows: tuple[Mapping[str, float], ...]
    gpus: tuple[Gpu, ...]
    latency_ms: np.ndarray
    judged: Mapping[str, Mapping[str, Any]]

    @property
    def macs(self) -> np.ndarray:
        return np.array([total_macs(row) for row in self.rows])

    @property
    def priced(self) -> np.ndarray:
        """Amounts of each price, (n, len(PRICES))."""
        return priced(self.rows, PRICES)

    @property
    def seven(self) -> np.ndarray:
        return np.array([seven_features(row) for row in self.rows])


def read_phone_table(
    table: Path, graphs: Path, gpus: Sequence[Gpu] = GPUS, columns: PhoneColumns = COLUMNS
) -> PhoneTable:
    """Networks in floats, on those of the GPUs whose runs are usable; raises BadInput.

    Quantized networks are left out: ncnn runs them on the CPU (the table has them faster or slower than floats by
    what the CPU, not the GPU, makes of them).
    """
    measured = _read_rows(table, gpus, columns)
    names = {row[columns.model] for rows in measured.values() for row in rows} - set(LEFT_OUT)
    features = {name: _features(graphs, name) for name in sorted(names)}
    judged = {}
    for gpu in gpus:
        rows = [row for row in measured[gpu.name] if row[columns.model] in features]
        if (count := len({row[columns.model] for row in rows})) < FEWEST_NETWORKS:
            raise BadInput(f"{table}: {gpu.name} ran {count} networks; expected at least {FEWEST_NETWORKS}")
        judged[gpu.name] = _judge(rows, features, columns, table)
    usable = tuple(gpu for gpu in gpus if judged[gpu.name]["used"])
    if not usable:
        raise BadInput(f"{table}: the latencies of {', '.join(judged)} hardly follow the MACs or vary: none is usable")
    found: dict[tuple[str, str], float] = {}
    for gpu in usable:
        for row in measured[gpu.name]:
            at, latency = (gpu.name, row[columns.model]), positive(row, columns.latency, table)
            found[at] = min(latency, found.get(at, latency))  # one GPU was run twice
    ran = tuple(name for name in features if any((gpu.name, name) in found for gpu in usable))
    latency_ms = np.array([[found.get((gpu.name, name), np.nan) for name in ran] for gpu in usable])
    return PhoneTable(ran, tuple(features[name] for name in ran), usable, latency_ms, judged)


def _read_rows(table: Path, gpus: Sequence[Gpu], columns: PhoneColumns) -> dict[str, list[dict[str, str]]]:
    """The rows of each GPU, of networks in floats; all rows where the table does not tell backend and precision."""
    rows = [
        row
        for row in read_rows(table, (columns.model, columns.device, columns.latency))
        if row[columns.latency] and row.get("backend", VULKAN) == VULKAN and row.get("precision", FLOATS) == FLOATS
    ]
    found = {gpu.name: [row for row in rows if gpu.pattern in row[columns.device]] for gpu in gpus}
    if missing := [gpu for gpu in gpus if not found[gpu.name]]:
        raise BadInput(f"{table}: no rows of {', '.join(f'{gpu.name} ({gpu.pattern!r})' for gpu in missing)}")
    return found


def _features(graphs: Path, name: str) -> dict[str, float]:
    try:
        found = graph_features(read_graph(graphs, name), INPUT_OF.get(name))
        priced([found], PRICES)  # refuses a family without a price
    except (OSError, ValueError, LookupError) as error:
        raise BadInput(f"{graphs}: the graph of {name} cannot be used ({error})") from None
    return found


def _judge(
    rows: Sequence[Mapping[str, str]], features: Mapping[str, Mapping[str, float]], columns: PhoneColumns, table: Path
) -> dict[str, Any]:
    """Whether a GPU's runs are usable, by the rule above, and the figures it goes by."""
    macs = [total_macs(features[row[columns.model]]) for row in rows]
    spearman = spearman_rho(np.array(macs), np.array([positive(row, columns.latency, table) for row in rows]))
    spread = None
    if all(name in rows[0] for name in REPETITIONS):
        average, fastest = ([positive(row, name, table) for row in rows] for name in REPETITIONS)
        spread = float(np.median(np.array(average) / np.array(fastest)))
    return {
        "device": rows[0][columns.device],
        "rows": len(rows),
        "spearman_of_macs": spearman,
        "median_average_over_minimum": spread,
        "used": (spearman or 0.0) >= LOWEST_SPEARMAN and (spread or 1.0) <= LARGEST_SPREAD,
    }
