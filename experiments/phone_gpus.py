"""Phone and board GPUs in ncnn's benchmark: which runs can be used, and what of a network they are told by."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.ncnn_graphs import INPUT_OF, graph_features, read_graph
from experiments.prices import Price, priced

TABLE = "ncnn_phone_latency.csv.gz"
GRAPHS = "ncnn_param"


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


def read_phone_table(data: Path) -> PhoneTable:
    """Networks in floats, on the GPUs whose runs are usable.

    Quantized networks are left out: ncnn runs them on the CPU (the table has them faster or slower than floats by
    what the CPU, not the GPU, makes of them).
    """
    table = _read_rows(data)
    names = tuple(dict.fromkeys(row["model"] for rows in table.values() for row in rows))
    names = tuple(sorted(set(names) - set(LEFT_OUT)))
    features = {name: graph_features(read_graph(data / GRAPHS, name), INPUT_OF.get(name)) for name in names}
    judged = {gpu.name: _judge(table[gpu.name], features) for gpu in GPUS}
    usable = tuple(gpu for gpu in GPUS if judged[gpu.name]["used"])
    latency_ms = np.full((len(usable), len(names)), np.nan)
    for i, gpu in enumerate(usable):
        for row in table[gpu.name]:
            if row["model"] in features:
                j = names.index(row["model"])
                latency_ms[i, j] = np.fmin(latency_ms[i, j], float(row["min_ms"]))  # one GPU was run twice
    return PhoneTable(names, tuple(features[name] for name in names), usable, latency_ms, judged)


def _read_rows(data: Path) -> dict[str, list[dict[str, str]]]:
    """The rows of each GPU, of networks in floats."""
    with gzip.open(data / TABLE, "rt", encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["backend"] == "gpu_vulkan" and row["precision"] == "fp"]
    found = {gpu.name: [row for row in rows if gpu.pattern in row["device"]] for gpu in GPUS}
    missing = [name for name, own in found.items() if not own]
    if missing:
        raise ValueError(f"{data / TABLE}: no rows of {', '.join(missing)}")
    return found


def _judge(rows: Sequence[Mapping[str, str]], features: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Whether a GPU's runs are usable, by the rule above, and the figures it goes by."""
    from scipy.stats import spearmanr

    known = [row for row in rows if row["model"] in features]
    macs = [total_macs(features[row["model"]]) for row in known]
    spearman = float(spearmanr(macs, [float(row["min_ms"]) for row in known]).statistic)
    spread = float(np.median([float(row["avg_ms"]) / float(row["min_ms"]) for row in known]))
    return {
        "device": rows[0]["device"],
        "rows": len(known),
        "spearman_of_macs": spearman,
        "median_average_over_minimum": spread,
        "used": spearman >= LOWEST_SPEARMAN and spread <= LARGEST_SPREAD,
    }
