"""Profiling: from a device profile to figures one can search with."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hardware_profiles import DeviceProfile
from hardware_profiles.host_cpu import measure_models
from hardware_profiles.machine import int8_weight_limit
from hardware_profiles.measurement import Measurement, repeat_noise
from hardware_profiles.onnx_writer import random_ranges, random_weights, write_onnx
from nas.costs import ProfiledDevice
from nas.progress import progress_bar
from nas.sampling import sample_spread
from predictors import LatencyPredictor
from search_spaces import Architecture, Network, SearchSpace

FEWEST_SAMPLES = 60


def anchor_record() -> Path:
    """Where the best times ever seen of this machine's anchor network are kept, for all runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fitnest" / "anchor.json"


def profile(
    space: SearchSpace,
    device: DeviceProfile,
    *,
    samples: int = 72,
    seed: int = 0,
    patience_s: float = 180.0,
) -> ProfiledDevice:
    """Figures of a device for a space: fitted on measurements where the device is this machine, else as shipped.

    Args:
        space: whose random subnets, spread over MACs and precisions, are measured.
        device: from `hardware_profiles.load_device`.
        samples: subnets to measure; at least 60.
        seed: which subnets.
        patience_s: how long to wait for slow phases of the machine to pass.

    Raises hardware_profiles.host_cpu.NoisyMachine when the machine stays slow, ValueError for too few samples.
    """
    if not device.is_measured_live:
        return ProfiledDevice(device)
    if samples < FEWEST_SAMPLES:
        raise ValueError(
            f"{samples} samples are too few to fit and judge a predictor; expected {FEWEST_SAMPLES} or more"
        )
    architectures = [*_extremes(space, device), *sample_spread(space, samples, np.random.default_rng([seed, 8]))]
    architectures = list(dict.fromkeys(architectures))
    measured = measure_untrained(space, architectures, device, seed=seed, patience_s=patience_s)
    networks = [space.lower(a) for a in architectures]
    latencies = [measured[a.id].latency_ms for a in architectures]
    first = next(iter(measured.values())).provenance
    predictor = LatencyPredictor(seed=seed).fit(
        networks,
        latencies,
        {
            "device": first.device,
            "runtime": first.runtime,
            "threads": first.threads,
            "batch": first.batch,
            "cpu": first.cpu,
            "date": first.date,
            "anchor_ms": first.anchor_ms,
            "networks": len(networks),
            "architectures": list(measured),
        },
    )
    return ProfiledDevice(device, predictor)


def _extremes(space: SearchSpace, device: DeviceProfile) -> list[Architecture]:
    legal = set(device.precisions.get("conv2d", ())) | set(device.precisions.get("linear", ()))
    ends = (space.smallest, space.largest)
    return [space.with_precision(end, precision) for end in ends for precision in sorted(legal)]


def untrained_model(network: Network, seed: int) -> bytes:
    """A network with random weights, as ONNX: its latency is that of the trained one."""
    weights = random_weights(network, np.random.default_rng(seed))
    model = write_onnx(network, weights, random_ranges(network), weight_limit=int8_weight_limit())
    return bytes(model.SerializeToString())


def measure_untrained(
    space: SearchSpace,
    architectures: Sequence[Architecture],
    device: DeviceProfile,
    *,
    seed: int = 0,
    patience_s: float = 180.0,
) -> dict[str, Measurement]:
    """Latencies of architectures by id, with random weights."""
    models = {a.id: untrained_model(space.lower(a), seed) for a in architectures}
    return measure(models, device, patience_s=patience_s)


def measure(models: Mapping[str, bytes], device: DeviceProfile, *, patience_s: float = 180.0) -> dict[str, Measurement]:
    """Measure ONNX models on this machine in a process of their own, with a progress bar."""
    with progress_bar(desc=f"measure on {device.name}", unit="round") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return measure_models(
            models,
            threads=device.threads,
            patience_s=patience_s,
            anchor_record=anchor_record(),
            progress=progress,
        )


@dataclass(frozen=True)
class PredictorCheck:
    """Predictions against measurements of subnets that the predictor never saw, made in later processes."""

    networks: int
    median_error: float
    within_10_percent: float
    spearman: float
    macs_only_median_error: float
    repeat_noise: float
    rows: tuple[dict[str, float | str], ...]


def check_predictor(
    space: SearchSpace, device: ProfiledDevice, *, samples: int = 24, seed: int, patience_s: float = 180.0
) -> PredictorCheck:
    """Measure fresh subnets twice, in two processes, and compare with what was predicted.

    `macs_only_median_error` is that of the best line through the MACs of these very measurements (an
    optimistic baseline); `repeat_noise` the median relative difference of the two measurements.

    Raises ValueError for a device without a predictor, or a space too small to hold subnets it never saw.
    """
    from scipy.stats import spearmanr

    if device.predictor is None:
        raise ValueError(f"{device.name} has no predictor to check; fit one with nas.profile(space, device)")
    seen = set(device.predictor.provenance.get("architectures", ()))
    spread = sample_spread(space, samples + len(seen), np.random.default_rng([seed, 9]))
    fresh = [architecture for architecture in spread if architecture.id not in seen]
    architectures = [fresh[int(i)] for i in np.unique(np.linspace(0, len(fresh) - 1, samples).round())] if fresh else []
    if len(architectures) < 3:
        raise ValueError(
            f"the space holds {len(fresh)} subnets that the predictor of {device.name} never saw; expected 3"
        )
    networks = [space.lower(a) for a in architectures]
    first, second = (
        measure_untrained(space, architectures, device.profile, seed=seed, patience_s=patience_s) for _ in range(2)
    )
    measured = np.array([(first[a.id].latency_ms + second[a.id].latency_ms) / 2 for a in architectures])
    predicted = np.array([p.mean_ms for p in device.predictor.predict(networks)])
    macs = np.array([network.macs for network in networks], dtype=float)
    columns = np.stack([macs, np.ones_like(macs)], axis=1) / measured[:, None]
    line = np.linalg.lstsq(columns, np.ones_like(macs), rcond=None)[0]
    errors = np.abs(predicted / measured - 1)
    rows: tuple[dict[str, float | str], ...] = tuple(
        {
            "id": a.id,
            "macs": n.macs,
            "int8_macs_share": round(n.int8_macs_share, 3),
            "predicted_ms": round(float(p), 5),
            "measured_ms": round(float(m), 5),
        }
        for a, n, p, m in zip(architectures, networks, predicted, measured, strict=True)
    )
    return PredictorCheck(
        len(rows),
        float(np.median(errors)),
        float((errors <= 0.1).mean()),
        float(spearmanr(predicted, measured).statistic),
        float(np.median(np.abs(columns @ line - 1))),
        repeat_noise(first, second),
        rows,
    )
