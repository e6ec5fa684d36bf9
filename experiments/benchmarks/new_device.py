"""A new device from ten measurements: how close predictions of all other subnets come, on a space of mixed precision.

    python experiments/benchmarks/new_device.py [--recipe quickstart] [--networks 110] [--samples 10] [--draws 30]

Fresh subnets of the recipe's space, spread over MACs and precisions, are measured once, a dozen in a process, and kept
in a CSV file (`--measurements`; what it holds is not measured again). Then, draw by draw, half of them at random are
what samples may be chosen from, and all that is no sample is predicted. Methods:

    ours            `predictors.choose_networks`, then `NewDevicePredictor`
    ours_random     the same with samples drawn at random
    ours_alone      `ours` without known devices
    sources_alone   the known device whose latencies explain the samples best, times a factor; same samples as ours
    macs            a line through the MACs of samples drawn at random, of least squared relative error
    all_others      no method, but what ten samples cannot beat: `LatencyPredictor` in ten-fold cross-validation

Numbers are means over draws, with the deviation of single draws. `coverage` is the share of held-out measurements that
lie in the 90 % interval, `half_width` half of that as a share of the prediction.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, about, finish, out_option, recipe_space

from hardware_profiles import DeviceProfile, load_device
from hardware_profiles.measured_csv import read_measurements, write_measurements
from hardware_profiles.measurement import Measurement
from nas.profile import BATCH, known_devices, measure_untrained, shuffled_spread
from predictors import KnownDevice, LatencyPredictor, NewDevicePredictor, choose_networks
from predictors.prices import Amounts, bases_of
from predictors.regression import fit_coefficients, scores, with_constant
from search_spaces import Architecture, Network, SearchSpace

Answer = tuple[np.ndarray, np.ndarray, float | None]  # rows that were measured, milliseconds of all, half the interval


def measured(
    space: SearchSpace, device: DeviceProfile, path: Path, count: int, seed: int, patience_s: float
) -> dict[Architecture, Measurement]:
    """The measurements in the file, and new ones where it has fewer than `count`; it is written after each batch."""
    found: dict[Architecture, Measurement] = {}
    if path.exists():
        found = read_measurements(path, space, device=device.name, runtime=device.runtime, threads=device.threads)
    if len(found) >= count:
        return found
    wanted = [one for one in shuffled_spread(space, count, [seed, 13]) if one not in found][: count - len(found)]
    for start in range(0, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        new = measure_untrained(space, batch, device, seed=seed, patience_s=patience_s)
        found |= {one: new[one.id] for one in batch}
        write_measurements(path, found)
    return found


class Task:
    """n networks of one device, with latencies (n,), and the known devices."""

    def __init__(self, networks: Sequence[Network], latency_ms: np.ndarray, known: Sequence[KnownDevice]) -> None:
        self.networks, self.latency_ms, self.known = list(networks), latency_ms, known
        self.macs = with_constant(np.array([[float(network.macs)] for network in networks]))
        amounts = Amounts.of(self.networks)
        lists = bases_of(amounts, self.networks, known).log_prices[1:]
        self.sources_log_ms = np.log(np.exp(lists) @ amounts.matrix.T)  # (devices, n)

    def pool(self, draw: int) -> np.ndarray:
        """Rows that samples may be chosen from, in random order."""
        return np.random.default_rng([draw, 14]).permutation(len(self.networks))[: len(self.networks) // 2]

    def informative(self, draw: int, samples: int) -> np.ndarray:
        pool = self.pool(draw)
        return pool[choose_networks([self.networks[row] for row in pool], samples, draw)]

    def ours(self, chosen: np.ndarray, pool: np.ndarray, known: Sequence[KnownDevice]) -> Answer:
        networks = [self.networks[row] for row in (*chosen, *np.setdiff1d(pool, chosen))]
        predictor = NewDevicePredictor().fit(networks, range(len(chosen)), self.latency_ms[chosen], known)
        found = np.array([one.mean_ms for one in predictor.predict(self.networks)])
        return chosen, found, predictor.report()["relative_error_90"]

    def sources_alone(self, chosen: np.ndarray) -> Answer:
        gap = np.log(self.latency_ms[chosen]) - self.sources_log_ms[:, chosen]
        best = int(np.argmin(gap.std(axis=1)))
        return chosen, np.exp(self.sources_log_ms[best] + gap[best].mean()), None

    def line(self, chosen: np.ndarray) -> Answer:
        return chosen, self.macs @ fit_coefficients(self.macs[chosen], self.latency_ms[chosen]), None


def judged(answer: Answer, latency_ms: np.ndarray) -> dict[str, float]:
    chosen, predicted_ms, half_width = answer
    rest = np.setdiff1d(np.arange(len(latency_ms)), chosen)
    predicted_ms, actual_ms = predicted_ms[rest], latency_ms[rest]
    found = scores(predicted_ms, actual_ms)
    del found["mape"]
    if half_width is not None:
        inside = np.abs(actual_ms / predicted_ms - 1) <= half_width
        found |= {"coverage": float(inside.mean()), "half_width": half_width}
    return found


def compared(task: Task, samples: int, draws: int) -> dict[str, dict[str, list[float]]]:
    """Method -> score -> (mean, deviation of single draws)."""
    methods: dict[str, Callable[[int], Answer]] = {
        "ours": lambda draw: task.ours(task.informative(draw, samples), task.pool(draw), task.known),
        "ours_random": lambda draw: task.ours(task.pool(draw)[:samples], task.pool(draw), task.known),
        "ours_alone": lambda draw: task.ours(task.informative(draw, samples), task.pool(draw), ()),
        "sources_alone": lambda draw: task.sources_alone(task.informative(draw, samples)),
        "macs": lambda draw: task.line(task.pool(draw)[:samples]),
    }
    return {
        name: _mean_and_deviation([judged(method(draw), task.latency_ms) for draw in range(draws)])
        for name, method in methods.items()
    }


def _mean_and_deviation(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    columns = {name: np.array([row[name] for row in rows], float) for name in rows[0]}
    return {name: [round(float(column.mean()), 5), round(float(column.std()), 5)] for name, column in columns.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="quickstart", help="whose space")
    parser.add_argument("--device", default="host-cpu")
    parser.add_argument("--channels", type=int, default=3, help="of the images, which a run takes from its data")
    parser.add_argument("--networks", type=int, default=110, help="subnets to measure")
    parser.add_argument("--samples", type=int, default=10, help="measurements that a predictor sees")
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--patience", type=float, default=600.0, help="seconds to wait for the machine to be quiet")
    parser.add_argument("--measurements", type=Path, help="CSV file; results/new_device_RECIPE.csv by default")
    out_option(parser, "new_device")
    asked = parser.parse_args(arguments)
    space, device = recipe_space(asked.recipe, channels=asked.channels), load_device(asked.device)
    path = asked.measurements or RESULTS / f"new_device_{asked.recipe}.csv"
    found = measured(space, device, path, asked.networks, asked.seed, asked.patience)
    networks = [space.lower(one) for one in found]
    latency_ms = np.array([one.latency_ms for one in found.values()])
    known = known_devices(device)
    result: dict[str, Any] = {
        **about([asked.seed]),
        "recipe": asked.recipe,
        "space": space.name,
        "networks": len(found),
        "samples": asked.samples,
        "draws": asked.draws,
        "latency_ms": [float(latency_ms.min()), float(latency_ms.max())],
        "known_devices": [one.name for one in known],
        "methods": compared(Task(networks, latency_ms, known), asked.samples, asked.draws),
        "all_others": LatencyPredictor().fit(networks, latency_ms).report(),
    }
    finish(result, asked.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
