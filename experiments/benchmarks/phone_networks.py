"""How well the latency of a network that was never run is predicted on phone and board GPUs (ncnn's benchmark).

    python experiments/benchmarks/phone_networks.py --table T.csv[.gz] --graphs FOLDER [--architecture-columns model] \\
        [--device-column device] [--latency-column min_ms] [--devices NAME,NAME=PATTERN,...]
    python experiments/benchmarks/phone_networks.py --data DIR

The second is the first with ncnn_phone_latency.csv.gz and ncnn_param/*.param of that folder. --table has one row a
measurement; the graph of its network is a file of that name in --graphs, as ncnn writes them. Where the table has the
columns backend and precision, the rows of Vulkan and floats are taken. --devices are by default the GPUs of
experiments/phone_gpus.py; a NAME is one of them, and NAME=PATTERN is a device whose rows' device contains PATTERN. A
device whose latencies hardly follow the MACs or vary between repetitions is not judged (`gpus_of_the_table` says why).

Each network is left out in turn, on all GPUs at once, so that nothing of it is known anywhere. Methods:

    macs_only         a line through the MACs, each GPU alone
    seven_features    constant, operators, MACs dense, 1x1 and depthwise, bytes of activations and weights, each alone
    prices_alone      the prices of the shipped profiles, each GPU alone
    pooled            those prices, fitted on all GPUs together: what is shipped
    pooled_families   the same, a network's relatives (same backbone or design) left out with it

Features and penalties were chosen on these networks, so `pooled` is somewhat optimistic; `penalties` shows how little
the penalty matters. Intervals are of 90 %: that of a network is made of the residuals of the others, each predicted
without itself and without the network. Prints JSON and writes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import about, out_option
from csv_tables import BadInput, as_many, command, file_options, files_of, listed

from experiments.phone_gpus import COLUMNS, GPUS, GRAPHS, TABLE, Gpu, PhoneColumns, PhoneTable, read_phone_table
from predictors.pooled import PENALTY, predict_networks_left_out
from predictors.regression import RIDGE, predict_left_out, relative_interval, scores, with_constant

NAME = Path(__file__).stem
FILES = {"table": (TABLE, "latencies"), "graphs": (GRAPHS, "the folder of the networks' graphs")}
PENALTIES = (0.0003, 0.001, PENALTY, 0.01, 0.03)
RELATIVES = (  # networks of one backbone, or two sizes or generations of one design
    ("efficientnet_b0", "efficientnetv2_b0"),
    ("mobilenet", "mobilenet_ssd", "mobilenet_yolo"),
    ("mobilenet_v2", "mobilenetv2_yolov3"),
    ("mnasnet", "proxylessnasnet"),
    ("resnet18", "resnet50"),
    ("shufflenet", "shufflenet_v2", "nanodet_m", "FastestDet", "yolo-fastestv2"),
    ("squeezenet", "squeezenet_ssd"),
)


def families_of(names: tuple[str, ...]) -> np.ndarray:
    """A number for each network (n,), the same for relatives."""
    family = {name: relatives[0] for relatives in RELATIVES for name in relatives}
    return np.unique([family.get(name, name) for name in names], return_inverse=True)[1]


def each_alone(table: PhoneTable, matrix: np.ndarray, ridge: float) -> np.ndarray:
    """Left-out latencies (k, n) of one additive model a GPU, on `matrix` (n, d)."""
    predicted = np.full(table.latency_ms.shape, np.nan)
    for i, measured in enumerate(table.latency_ms):
        ran = np.flatnonzero(~np.isnan(measured))
        predicted[i, ran] = predict_left_out(matrix[ran], measured[ran], np.arange(len(ran)), ridge)
    return predicted


def nested_coverage(table: PhoneTable, predicted: np.ndarray) -> dict[str, Any]:
    """Share of the measurements inside intervals made without them."""
    hits: dict[str, list[bool]] = {gpu.name: [] for gpu in table.gpus}
    for network in range(len(table.names)):
        rest = np.arange(len(table.names)) != network
        inner = predict_networks_left_out(table.priced[rest], table.latency_ms[:, rest], np.arange(rest.sum()))
        for i, gpu in enumerate(table.gpus):
            measured = table.latency_ms[i]
            if not np.isnan(measured[network]):
                ran = ~np.isnan(measured[rest])
                relative_error, _ = relative_interval(inner[i, ran], measured[rest][ran])
                hits[gpu.name].append(abs(measured[network] / predicted[i, network] - 1) <= relative_error)
    everything = [hit for own in hits.values() for hit in own]
    return {
        "n": len(everything),
        "coverage": float(np.mean(everything)),
        "gpus": {name: float(np.mean(own)) for name, own in hits.items()},
    }


def judged(table: PhoneTable, predicted: np.ndarray) -> dict[str, Any]:
    """Errors on each GPU, and their means."""
    gpus = {}
    for gpu, own, measured in zip(table.gpus, predicted, table.latency_ms, strict=True):
        ran = ~np.isnan(measured)
        gpus[gpu.name] = {"networks": int(ran.sum()), **scores(own[ran], measured[ran])}
    return {
        "mean_mape": float(np.mean([one["mape"] for one in gpus.values()])),
        "mean_spearman": float(np.mean([one["spearman"] for one in gpus.values()])),
        "gpus": gpus,
    }


def benchmark(table: PhoneTable) -> dict[str, Any]:
    alone = np.arange(len(table.names))
    pooled = predict_networks_left_out(table.priced, table.latency_ms, alone)
    families = predict_networks_left_out(table.priced, table.latency_ms, families_of(table.names))
    methods = {
        "macs_only": each_alone(table, with_constant(table.macs[:, None]), ridge=0.0),
        "seven_features": each_alone(table, table.seven, ridge=0.0),
        "prices_alone": each_alone(table, table.priced, ridge=RIDGE),
        "pooled": pooled,
        "pooled_families": families,
    }
    return {
        **about(),
        "networks": list(table.names),
        "gpus_of_the_table": table.judged,
        "methods": {name: judged(table, predicted) for name, predicted in methods.items()},
        "intervals": nested_coverage(table, pooled),
        "penalties": {
            str(penalty): judged(table, predict_networks_left_out(table.priced, table.latency_ms, alone, penalty))[
                "mean_mape"
            ]
            for penalty in PENALTIES
        },
    }


def read_table(asked: argparse.Namespace) -> PhoneTable:
    """The networks and GPUs that the arguments ask for; raises BadInput."""
    files = files_of(asked, FILES)
    table, graphs = files["table"], files["graphs"]
    if table is None or graphs is None:
        raise BadInput("expected both --table and --graphs")
    model = as_many("--architecture-columns", asked.architecture_columns, [COLUMNS.model])[0]
    columns = PhoneColumns(model, asked.device_column, asked.latency_column)
    found = read_phone_table(table, graphs, gpus_of(asked.devices), columns)
    for gpu, measured in zip(found.gpus, found.latency_ms, strict=True):
        if len(set(families_of(found.names)[~np.isnan(measured)].tolist())) < 2:
            raise BadInput(f"all networks that {gpu.name} ran are relatives; expected at least two designs")
    return found


def gpus_of(devices: str | None) -> tuple[Gpu, ...]:
    """GPUs by name, and devices as NAME=PATTERN; all known GPUs by default."""
    known = {gpu.name: gpu for gpu in GPUS}
    found: dict[str, Gpu] = {}
    for text in listed(devices):
        name, _, pattern = text.partition("=")
        if not pattern and name not in known:
            raise BadInput(f"no device {text!r}; expected NAME=PATTERN or one of {', '.join(known)}")
        if name in found:
            raise BadInput(f"--devices has {name!r} twice")
        found[name] = Gpu(name, name, pattern) if pattern else known[name]
    return tuple(found.values()) or GPUS


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    file_options(parser, FILES)
    parser.add_argument("--architecture-columns", default=COLUMNS.model, help="the column of the networks' names")
    parser.add_argument("--device-column", default=COLUMNS.device)
    parser.add_argument("--latency-column", default=COLUMNS.latency, help="milliseconds; the least of a network counts")
    parser.add_argument("--devices", help="NAME or NAME=PATTERN, separated by commas; all known GPUs by default")
    out_option(parser, NAME)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    return command(NAME, lambda asked: benchmark(read_table(asked)), parsed(arguments))


if __name__ == "__main__":
    sys.exit(main())
