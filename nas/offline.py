"""Devices that are measured by other means: what to measure, as files, and a profile from a CSV file."""

from __future__ import annotations

import logging
from pathlib import Path

from hardware_profiles import DeviceProfile
from hardware_profiles.files import sha256_of, write_bytes
from hardware_profiles.measured_csv import read_measurements, write_unmeasured
from nas.costs import ProfiledDevice
from nas.profile import (
    FEWEST_SAMPLES,
    FEWEST_WITH_HELP,
    fit_few,
    informative,
    provenance_of,
    shuffled_spread,
    untrained_model,
    warn_of_doubtful,
)
from predictors import LatencyPredictor
from search_spaces import SearchSpace

log = logging.getLogger(__name__)


def write_plan(space: SearchSpace, device: DeviceProfile, path: Path, *, samples: int, seed: int) -> Path:
    """Write the subnets to measure as a CSV file with empty latencies, and their ONNX files, ID.onnx, in a folder.

    They are those that `nas.profile` would measure, the extremes of 48 or more aside. Returns the folder.

    Raises ValueError for too few samples, or a file that is there and may hold measurements.
    """
    if samples < FEWEST_WITH_HELP:
        raise ValueError(f"{samples} samples are too few; expected {FEWEST_WITH_HELP}, better ten, or more")
    if path.exists():
        raise ValueError(f"{path} is there and may hold measurements; give another name, or delete it")
    if samples < FEWEST_SAMPLES:
        chosen = informative(space, device, samples, seed)
    else:
        chosen = shuffled_spread(space, samples, [seed, 8])
    folder = path.with_name(f"{path.stem}_models")
    folder.mkdir(parents=True, exist_ok=True)
    for one in chosen:
        write_bytes(folder / f"{one.id}.onnx", untrained_model(space.lower(one), seed))
    write_unmeasured(path, chosen)
    return folder


def profile_measured(space: SearchSpace, device: DeviceProfile, path: Path, *, seed: int) -> ProfiledDevice:
    """A device profiled on the measurements of a CSV file; below 48 architectures with the help of known devices.

    Raises hardware_profiles.measured_csv.InvalidMeasurements for rows that are wrong, and ValueError for a device that
    is not measured, too few architectures, or one that the device cannot run.
    """
    if not device.is_measured:
        raise ValueError(
            f"{device.name}: its latency is {device.latency_model.origin}; only a device file with 'origin: measured' "
            "takes measurements"
        )
    measured = read_measurements(
        path, space, device=device.name, runtime=device.runtime, threads=device.threads, hardware=device.title
    )
    log.info("%s: %d architectures read, all of %s", path, len(measured), space.name)
    if len(measured) < FEWEST_WITH_HELP:
        raise ValueError(f"{path}: {len(measured)} architectures are too few; expected {FEWEST_WITH_HELP}, better ten")
    for one in measured:
        illegal = device.illegal_layers(space.lower(one))
        if illegal:
            raise ValueError(f"{path}: {device.name} cannot run {illegal[0]} of {one}; see its file's precisions")
    source = {"file": path.name, "sha256": sha256_of(path)}
    if len(measured) < FEWEST_SAMPLES:
        return ProfiledDevice(device, fit_few(space, device, measured, seed=seed, source=source))
    warn_of_doubtful(space, device, measured)
    predictor = LatencyPredictor(seed=seed).fit(
        [space.lower(one) for one in measured],
        [one.latency_ms for one in measured.values()],
        {**provenance_of(measured), **source},
        groups=[one.provenance.date for one in measured.values()],
    )
    return ProfiledDevice(device, predictor)
