"""Profiling: from a device profile to figures one can search with."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles import DeviceProfile, device_names, features, load_device
from hardware_profiles.command_backend import CommandBackend
from hardware_profiles.files import read_json, write_json
from hardware_profiles.host_cpu import measure_models
from hardware_profiles.machine import int8_weight_limit, this_machine
from hardware_profiles.measurement import Measurement, repeat_noise
from hardware_profiles.onnx_writer import random_ranges, random_weights, write_onnx
from nas.costs import ProfiledDevice
from nas.progress import progress_bar
from nas.sampling import sample_spread
from predictors import KnownDevice, LatencyPredictor, NewDevicePredictor, choose_networks, most_uncertain
from predictors.regression import matrix_of, spearman_rho
from search_spaces import Architecture, Network, SearchSpace

log = logging.getLogger(__name__)

FEWEST_SAMPLES = 48  # below, a fit of its own and what is said of its error are not worth much
FEWEST_WITH_HELP = 4  # of a device that is learned with the help of known ones
POOL = 300  # subnets out of which those few are chosen
BATCH = 12  # subnets measured in one process; later, half of them are drawn and half the least certain
CANDIDATES = 400  # subnets that are looked at for the least certain
RECORD_SCHEMA = "fitnest.measurements.1"


ALIKE = 1e-3  # latencies that differ by a smaller share say nothing of their networks
# Far above what networks of a batch of one reach on any device of the kind, so that milliseconds are never doubted:
# a Cortex-M7 of 480 MHz has 2 MACs a cycle, sixteen cores with VNNI 128 each, the largest chips for phones and cars
# promise some 1e14 operations a second and reach a fraction of it.
MOST_MACS_PER_S = {"mcu": 5e9, "cpu": 2e12, "gpu": 1e13, "npu": 5e13}


def anchor_record() -> Path:
    """Where the best times ever seen of this machine's anchor network are kept, for all runs."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fitnest" / "anchor.json"


def profile(
    space: SearchSpace,
    device: DeviceProfile,
    *,
    samples: int = 120,
    error: float = 0.05,
    seed: int = 0,
    patience_s: float = 180.0,
    record: Path | None = None,
) -> ProfiledDevice:
    """Figures of a device for a space: fitted on measurements where its profile says `measured`, else as shipped.

    What is measured is this machine, or, where the profile has a command, what the command reaches: it is run.

    With fewer than 48 samples the device is learned with the help of the shipped ones: the samples are chosen to be
    informative, and prices are drawn towards those of the known devices (`predictors.prices`).

    Else the first subnets are the extremes and a spread over MACs and precisions. Then, batch by batch, half are drawn
    like those and half are what the predictor is least sure of, until its held-out error is small enough or `samples`
    are measured. The error is that of the drawn ones.

    Args:
        space: whose random subnets are measured.
        device: from `hardware_profiles.load_device`.
        samples: subnets to measure at most, the extremes aside; at least 4.
        error: half the 90 % interval, as a share of the prediction, at which to stop; not with fewer than 48 samples.
        seed: which subnets.
        patience_s: how long to wait for slow phases of the machine to pass, in each batch.
        record: JSON file that keeps what is measured, batch by batch; a profile that was stopped goes on from it.

    Raises hardware_profiles.host_cpu.NoisyMachine when the machine stays slow, command_backend.MeasurementFailed when
    a command does, ValueError for too few samples or a record that is none.
    """
    if not device.is_measured:
        return ProfiledDevice(device)
    if not device.is_at_hand and device.latency_model.command is None:
        raise ValueError(
            f"{device.name} is not this machine, and its file names no command that measures it; "
            "add 'latency.command', or measure it by other means with --plan and --measurements"
        )
    if samples < FEWEST_WITH_HELP:
        raise ValueError(f"{samples} samples are too few; expected {FEWEST_WITH_HELP}, better ten, or more")
    if samples < FEWEST_SAMPLES:
        return _profile_new(space, device, samples=samples, seed=seed, patience_s=patience_s, record=record)
    plan = _Plan(space, device, samples, seed)
    found = _read_record(record, space, device)
    history: list[tuple[int, float]] = []
    while True:
        missing = [one for one in plan.measured if str(one) not in found]
        if missing:
            batch = missing[:BATCH]  # in a process of its own: the error shall hold for other processes
            new = measure_untrained(space, batch, device, seed=seed, patience_s=patience_s, record=record)
            found = _of_one_kind(found, {str(one): new[one.id] for one in batch})
            _write_record(record, space, device, found)
            continue  # with the rest, and with what was measured otherwise before
        predictor = _fit(plan, found, history, seed)
        reached = history[-1][1]
        log.info("%d subnets measured: 90 %% of those left out are within %.1f %%", len(plan.measured), 100 * reached)
        if reached <= error or not plan.extend(predictor, [found[str(one)].latency_ms for one in plan.measured]):
            warn_of_doubtful(space, device, {one: found[str(one)] for one in plan.measured})
            return ProfiledDevice(device, predictor)


def _profile_new(
    space: SearchSpace, device: DeviceProfile, *, samples: int, seed: int, patience_s: float, record: Path | None
) -> ProfiledDevice:
    """A device of which only a few subnets are measured."""
    chosen = informative(space, device, samples, seed)
    found = _read_record(record, space, device)
    missing = [one for one in chosen if str(one) not in found]
    if missing:
        new = measure_untrained(space, missing, device, seed=seed, patience_s=patience_s, record=record)
        found = _of_one_kind(found, {str(one): new[one.id] for one in missing})
        _write_record(record, space, device, found)
    return ProfiledDevice(device, fit_few(space, device, {one: found[str(one)] for one in chosen}, seed=seed))


def informative(space: SearchSpace, device: DeviceProfile, samples: int, seed: int) -> list[Architecture]:
    """The subnets to measure where they are few: those that tell most about all others, then random ones.

    Raises ValueError where fewer subnets than `samples` can run on the device.
    """
    pool = _pool(space, device, seed)
    if len(pool) < samples:
        raise ValueError(f"{len(pool)} subnets of the space can run on {device.name}; expected {samples} or more")
    return [pool[int(place)] for place in choose_networks([space.lower(one) for one in pool], samples, seed)]


def fit_few(
    space: SearchSpace,
    device: DeviceProfile,
    measured: Mapping[Architecture, Measurement],
    *,
    seed: int,
    source: Mapping[str, str] | None = None,
) -> NewDevicePredictor:
    """A predictor from few measurements; `source` is added to its provenance."""
    warn_of_doubtful(space, device, measured)
    everything = list(dict.fromkeys([*measured, *_pool(space, device, seed)]))
    networks = [space.lower(one) for one in everything]
    latency_ms = [one.latency_ms for one in measured.values()]
    told = {**provenance_of(measured), **(source or {})}
    return NewDevicePredictor().fit(networks, range(len(measured)), latency_ms, known_devices(device), told)


def _pool(space: SearchSpace, device: DeviceProfile, seed: int) -> list[Architecture]:
    """Subnets of all sizes that can run on the device."""
    spread = shuffled_spread(space, POOL, [seed, 8])
    return [one for one in spread if not device.illegal_layers(space.lower(one))]


def known_devices(new: DeviceProfile) -> list[KnownDevice]:
    """The shipped devices that were measured."""
    found = []
    for name in device_names():
        shipped = load_device(name)
        additive = shipped.latency_model.additive
        if additive is None or shipped.latency_model.origin != "fitted" or name == new.name:
            continue
        legal = sorted({one for kind in ("conv2d", "linear") for one in shipped.precisions.get(kind, ())})
        found.append(KnownDevice(name, additive, legal[0] if len(legal) == 1 else ""))
    return found


class _Plan:
    """Which subnets are measured: extremes, `taken` of the drawn ones, and those picked for being uncertain."""

    def __init__(self, space: SearchSpace, device: DeviceProfile, samples: int, seed: int) -> None:
        self.space, self.device, self.samples, self.seed = space, device, samples, seed
        self.extremes = [space.unpatched(one) for one in _extremes(space, device)]  # what is measured runs whole
        # one spread after the other, so that who asks for more samples keeps those there are
        spreads = [shuffled_spread(space, FEWEST_SAMPLES, [seed, 8, i]) for i in range(-(-samples // FEWEST_SAMPLES))]
        self.drawn = list(dict.fromkeys(one for spread in spreads for one in spread))[:samples]
        self.taken = FEWEST_SAMPLES
        self.picked: list[Architecture] = []

    @property
    def measured(self) -> list[Architecture]:
        return list(dict.fromkeys([*self.extremes, *self.drawn[: self.taken], *self.picked]))

    @property
    def representative(self) -> list[bool]:
        """Which of `measured` were drawn."""
        drawn = set(self.drawn[: self.taken])
        return [one in drawn for one in self.measured]

    @cached_property
    def candidates(self) -> list[tuple[Architecture, Network]]:
        spread = sample_spread(self.space, CANDIDATES, np.random.default_rng([self.seed, 8]))
        return [(one, self.space.lower(one)) for one in dict.fromkeys(map(self.space.unpatched, spread))]

    def extend(self, predictor: LatencyPredictor, latency_ms: Sequence[float]) -> bool:
        """Add a batch; False where the samples are spent or the space is used up."""
        before = self.measured  # in the order of the latencies
        room = self.samples - min(self.taken, len(self.drawn)) - len(self.picked)
        self.taken += min(BATCH // 2, room)
        model, held = predictor.model, set(self.measured)
        left = [(one, features(network, model.channel_block)) for one, network in self.candidates if one not in held]
        rows = [features(self.space.lower(one), model.channel_block) for one in before]
        names = sorted({name for row in [*rows, *(row for _, row in left)] for name in row})
        known = matrix_of(rows, names) / np.array(latency_ms)[:, None]
        ahead = matrix_of([row for _, row in left], names)
        predicted_ms = ahead @ [model.coefficients.get(name, 0.0) for name in names] + model.constant_ms
        chosen = most_uncertain(known, ahead / predicted_ms[:, None], min(BATCH // 2, room - BATCH // 2))
        self.picked += [left[index][0] for index in chosen]
        return len(self.measured) > len(before)


def _fit(
    plan: _Plan, found: Mapping[str, Measurement], history: list[tuple[int, float]], seed: int
) -> LatencyPredictor:
    """The predictor on what is measured; its error is added to the history."""
    measured = plan.measured
    block = this_machine().channel_block if plan.device.is_at_hand else None
    predictor = LatencyPredictor(seed=seed, channel_block=block)
    networks = [plan.space.lower(one) for one in measured]
    latencies = [found[str(one)].latency_ms for one in measured]
    provenance = {
        **provenance_of({one: found[str(one)] for one in measured}),
        "history": list(history),
    }  # of the batches before: (subnets, error)
    processes = [found[str(one)].provenance.date for one in measured]
    predictor.fit(networks, latencies, provenance, representative=plan.representative, groups=processes)
    history.append((len(measured), round(predictor.report()["relative_error_90"], 5)))
    return predictor


def warn_of_doubtful(space: SearchSpace, device: DeviceProfile, measured: Mapping[Architecture, Measurement]) -> None:
    """Warn of latencies that are all the same, or too short to be milliseconds on a device of this kind."""
    latency_ms = np.array([one.latency_ms for one in measured.values()])
    if len(latency_ms) > 1 and np.ptp(latency_ms) <= ALIKE * latency_ms.mean():
        log.warning(
            "%s: all %d networks take %.4g ms, whatever their size; does what measures them run the model it is given?",
            device.name,
            len(latency_ms),
            latency_ms.mean(),
        )
    median = float(np.median([space.lower(one).macs / (one_ms.latency_ms / 1000) for one, one_ms in measured.items()]))
    most = MOST_MACS_PER_S[device.kind]
    if median > most:
        log.warning(
            "%s: half of the networks run more than %.2g MACs a second, which no %s does (%.2g at most): latencies are "
            "expected in milliseconds; were these in seconds?",
            device.name,
            median,
            device.kind,
            most,
        )


def provenance_of(measured: Mapping[Architecture, Measurement]) -> dict[str, Any]:
    """How the subnets that a predictor is fitted on were measured."""
    first = next(iter(measured.values())).provenance
    return {
        "device": first.device,
        "runtime": first.runtime,
        "threads": first.threads,
        "batch": first.batch,
        "cpu": first.cpu,
        "date": first.date,
        "anchor_ms": first.anchor_ms,
        "networks": len(measured),
        "architectures": [one.id for one in measured],
    }


def _of_one_kind(old: Mapping[str, Measurement], new: Mapping[str, Measurement]) -> dict[str, Measurement]:
    """Both together, without the old ones that were measured otherwise than the new."""
    key = next(iter(new.values())).provenance.key
    same = {name: one for name, one in old.items() if one.provenance.key == key}
    if len(same) < len(old):
        now = ", ".join(map(str, key))
        log.warning(
            "%d earlier measurements were made otherwise than now (%s) and are not used", len(old) - len(same), now
        )
    return {**same, **new}


def _read_record(path: Path | None, space: SearchSpace, device: DeviceProfile) -> dict[str, Measurement]:
    """What an earlier profile of the space measured in the same way, by architecture as text.

    Raises ValueError for any other file.
    """
    if path is None or not path.exists():
        return {}
    try:
        record: dict[str, Any] = read_json(path)
        if record["schema"] != RECORD_SCHEMA:
            raise ValueError(f"schema {record['schema']!r}, expected {RECORD_SCHEMA!r}")
        held = {name: Measurement.from_json(one) for name, one in record["measurements"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a record of measurements ({error}); delete it") from None
    if record["space"] != space.name or record.get("command") != _command_of(device):
        log.warning("%s holds measurements of another space or by another command, which are not used", path.name)
        return {}
    return held


def _write_record(
    path: Path | None, space: SearchSpace, device: DeviceProfile, found: Mapping[str, Measurement]
) -> None:
    if path is not None:
        held = {name: one.to_json() for name, one in found.items()}
        by = {"space": space.name, "command": _command_of(device)}
        write_json(path, {"schema": RECORD_SCHEMA, **by, "measurements": held})


def _command_of(device: DeviceProfile) -> str | None:
    command = device.latency_model.command
    return None if command is None else command.command


def shuffled_spread(space: SearchSpace, count: int, seed: Sequence[int]) -> list[Architecture]:
    """`sample_spread`, in random order and without patches."""
    rng = np.random.default_rng(seed)
    spread = list(dict.fromkeys(map(space.unpatched, sample_spread(space, count, rng))))
    return [spread[int(i)] for i in rng.permutation(len(spread))]


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
    record: Path | None = None,
) -> dict[str, Measurement]:
    """Latencies of architectures by id, with random weights; see `measure`."""
    models = {a.id: untrained_model(space.lower(a), seed) for a in architectures}
    return measure(models, device, patience_s=patience_s, record=record)


def measure(
    models: Mapping[str, bytes], device: DeviceProfile, *, patience_s: float = 180.0, record: Path | None = None
) -> dict[str, Measurement]:
    """Measure ONNX models by the command of the device, or on this machine in a process of their own.

    The visits of an unfinished measurement by a command are kept beside `record`, and gone on from.
    """
    command = device.latency_model.command
    with progress_bar(desc=f"measure on {device.name}", unit="round") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if command is not None:
            backend = CommandBackend(
                device=device.name,
                runtime=device.runtime,
                hardware=device.title,
                threads=device.threads,
                patience_s=patience_s,
                **asdict(command),
            )
            visits = record.with_suffix(".visits.json") if record else None
            return backend.measure(models, progress, record=visits)
        return measure_models(
            models,
            device=device.name,
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
    spearman: float | None
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
    if device.predictor is None:
        raise ValueError(f"{device.name} has no predictor to check; fit one with nas.profile(space, device)")
    seen = set(device.predictor.provenance.get("architectures", ()))
    spread = sample_spread(space, samples + len(seen), np.random.default_rng([seed, 9]))
    fresh = [
        architecture for architecture in dict.fromkeys(map(space.unpatched, spread)) if architecture.id not in seen
    ]
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
        spearman_rho(predicted, measured),
        float(np.median(np.abs(columns @ line - 1))),
        repeat_noise(first, second),
        rows,
    )
