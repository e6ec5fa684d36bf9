"""Latencies of ONNX models on a device that a command reaches: a phone through adb, a board through a script.

The networks are visited in rounds, one run of the command each, so that a slow phase of the device does not fall
on one network. A fixed anchor network is measured before and after every few visits; these count only if the
anchor was within 10 % of its best time, else they are made again. So far as `hardware_profiles.host_cpu`; but an
anchor here is one run of the command, and its best time is that of this measurement alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.command import (
    CommandFailed,
    CommandNotFound,
    CommandSettings,
    parse_latencies_ms,
    run_command,
)
from hardware_profiles.files import read_json, write_json
from hardware_profiles.host_cpu import QUANTILE, TOLERANCE, anchor_model, precision_label
from hardware_profiles.measurement import Measurement, Provenance

log = logging.getLogger(__name__)

VISITS_PER_ANCHOR = 8
OUTLIER_MADS = 5.0  # a run beyond the median plus so many median absolute deviations is dropped ...
OUTLIER_SHARE = 1.1  # ... unless it is within 10 % of the median: many devices print whole milliseconds
SPREAD_LIMIT = 0.05  # above it a measurement is warned about
LONGEST_PAUSE_S, PAUSE_GROWTH = 15.0, 1.6
RECORD_SCHEMA = 1

Progress = Callable[[int, int], None]


class MeasurementFailed(RuntimeError):
    """A device that could not be measured to the end.

    `model` is the name of the model that failed, None for the anchor; `measured` holds what can be said of the
    models visited before, perhaps of fewer rounds than wanted (`Measurement.rounds`).
    """

    def __init__(self, message: str, model: str | None, measured: Mapping[str, Measurement]) -> None:
        super().__init__(message)
        self.model = model
        self.measured = dict(measured)


class NoisyDevice(MeasurementFailed):
    """The device stayed slower than it had been."""


@dataclass(frozen=True, slots=True)
class Visit:
    """The runs that one run of the command printed, and the slower of the two anchors beside it."""

    runs_ms: tuple[float, ...]
    anchor_ms: float | None


class CommandBackend:
    """Measures models by a command.

    Args:
        command: a template with `{model}`; see `hardware_profiles.command.CommandSettings` for this and `timeout_s`,
            `retries`, `repeats` and `anchor`. Those of a device file are taken as `**dataclasses.asdict(settings)`.
        device, runtime, threads, hardware: of the provenance; `hardware` is what the user calls the processor.
        patience_s: how long to wait for slow phases to pass, in all; visits made in vain count.
        pause_s: before a further try; the pauses while the device is slow begin with it and grow.
    """

    def __init__(
        self,
        command: str,
        *,
        device: str,
        runtime: str,
        hardware: str,
        threads: int = 1,
        timeout_s: float = 120.0,
        retries: int = 2,
        repeats: int = 5,
        anchor: bool = True,
        patience_s: float = 300.0,
        pause_s: float = 1.0,
    ) -> None:
        self.settings = CommandSettings(command, timeout_s, retries, repeats, anchor)
        self.device, self.runtime, self.hardware, self.threads = device, runtime, hardware, threads
        self.patience_s, self.pause_s = patience_s, pause_s

    def measure(
        self, models: Mapping[str, bytes], progress: Progress | None = None, *, record: Path | None = None
    ) -> dict[str, Measurement]:
        """Measure serialized ONNX models with input `input` and output `logits`, batch 1, together.

        Args:
            models: name -> model.
            progress: called with (visits that count, visits wanted).
            record: JSON file for the visits so far. Where it exists, an unfinished measurement goes on from it; it is
                removed when all is measured.

        Raises MeasurementFailed naming a model that fails in every try, or NoisyDevice when patience runs out, both
        with what was measured before; InvalidCommand for a name that cannot stand in the command; ValueError for a
        record of something else.
        """
        if not models:
            return {}
        with tempfile.TemporaryDirectory(prefix="fitnest-") as name:
            subjects = []
            for i, (model, content) in enumerate(models.items()):
                subjects.append(self._subject(Path(name) / f"{i:05d}.onnx", model, content))
            anchor = None
            if self.settings.anchor:
                anchor = self._subject(Path(name) / "anchor.onnx", "anchor", anchor_model())
            campaign = _Campaign(self, subjects, anchor, record)
            campaign.resume()
            try:
                campaign.run(progress)
            except _Failed as error:
                kind = NoisyDevice if error.is_noise else MeasurementFailed
                raise kind(f"{self.device}: {error}", error.model, self._measurements(campaign)) from None
            measured = self._measurements(campaign)
        if record is not None:
            record.unlink(missing_ok=True)
        return measured

    def _subject(self, path: Path, name: str, content: bytes) -> _Subject:
        arguments = self.settings.arguments(path, name)
        path.write_bytes(content)
        digest = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()
        return _Subject(name, arguments, precision_label(content), digest)

    def _measurements(self, campaign: _Campaign) -> dict[str, Measurement]:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        measured = {}
        for subject in campaign.subjects:
            visits = subject.accepted(campaign.limit_ms)
            if not visits:
                continue
            figures = summarize([visit.runs_ms for visit in visits])
            anchors = [visit.anchor_ms for visit in visits if visit.anchor_ms is not None]
            anchor_ms = float(np.percentile(anchors, QUANTILE)) if anchors else None
            provenance = Provenance(
                self.device, self.runtime, self.threads, 1, subject.precision, self.hardware, date, anchor_ms
            )
            measured[subject.name] = Measurement(**figures, provenance=provenance)
            if (figures["spread"] or 0.0) > SPREAD_LIMIT:
                log.warning(
                    "%s, model %r: its %d rounds spread by %.0f %% (more than %.0f %%)",
                    *(self.device, subject.name, figures["rounds"], 100 * figures["spread"], 100 * SPREAD_LIMIT),
                )
        return measured


def summarize(rounds_ms: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The figures of a Measurement from the runs of each round, without outliers.

    A run is an outlier if it is beyond the median of all runs by 5 median absolute deviations and by 10 %; a round
    of nothing else is dropped with them. The spread of a single round is None.
    """
    runs = np.concatenate([np.asarray(runs_ms, float) for runs_ms in rounds_ms])
    middle = float(np.median(runs))
    limit_ms = max(middle + OUTLIER_MADS * float(np.median(np.abs(runs - middle))), OUTLIER_SHARE * middle)
    kept = [[run_ms for run_ms in runs_ms if run_ms <= limit_ms] for runs_ms in rounds_ms]
    kept = [runs_ms for runs_ms in kept if runs_ms]
    medians = np.array([np.median(runs_ms) for runs_ms in kept])
    typical = float(np.median(medians))
    all_kept = np.concatenate(kept)
    return {
        "latency_ms": float(np.percentile(medians, QUANTILE)),
        "p50_ms": float(np.percentile(all_kept, 50)),
        "p95_ms": float(np.percentile(all_kept, 95)),
        "spread": 1.4826 * float(np.median(np.abs(medians - typical))) / typical if len(kept) > 1 else None,
        "rounds": len(kept),
        "runs_per_round": int(np.median([len(runs_ms) for runs_ms in kept])),
        "outliers": len(runs) - len(all_kept),
    }


# rounds ------------------------------------------------------------------------------------------------------


@dataclass
class _Subject:
    """A model, the command for it, and its visits."""

    name: str
    arguments: list[str]
    precision: str
    digest: str
    visits: list[Visit] = field(default_factory=list)

    def accepted(self, limit_ms: float) -> list[Visit]:
        return [visit for visit in self.visits if visit.anchor_ms is None or visit.anchor_ms <= limit_ms]


class _Failed(RuntimeError):
    def __init__(self, message: str, model: str | None = None, *, is_noise: bool = False) -> None:
        super().__init__(message)
        self.model, self.is_noise = model, is_noise


@dataclass
class _Campaign:
    """Visits to the models in rounds, until each has enough that count."""

    backend: CommandBackend
    subjects: Sequence[_Subject]
    anchor: _Subject | None
    record: Path | None
    best_ms: float = float("inf")  # of the anchor
    lost_s: float = 0.0

    @property
    def limit_ms(self) -> float:
        return TOLERANCE * self.best_ms

    def run(self, progress: Progress | None) -> None:
        repeats = self.backend.settings.repeats
        size = VISITS_PER_ANCHOR if self.anchor else 1
        before_ms = None
        while lacking := [s for s in self.subjects if len(s.accepted(self.limit_ms)) < repeats]:
            for start in range(0, len(lacking), size):
                before_ms = self._visit_all(lacking[start : start + size], before_ms)
                if progress:
                    done = sum(min(len(s.accepted(self.limit_ms)), repeats) for s in self.subjects)
                    progress(done, repeats * len(self.subjects))

    def _visit_all(self, subjects: Sequence[_Subject], before_ms: float | None) -> float | None:
        """Visit each model once between two anchors; returns the second one."""
        before_ms = self._quiet_ms(before_ms)
        started_s = time.monotonic()
        for subject in subjects:
            subject.visits.append(Visit(self._run(subject), before_ms))
            self._save()
        after_ms = self._read_anchor()
        if before_ms is not None and after_ms is not None:
            for subject in subjects:
                subject.visits[-1] = Visit(subject.visits[-1].runs_ms, max(before_ms, after_ms))
            self._save()
            if after_ms > self.limit_ms:
                self._lose(time.monotonic() - started_s, after_ms)
        return after_ms

    def _quiet_ms(self, now_ms: float | None) -> float | None:
        """An anchor time that is accepted: `now_ms`, or one after some pauses; None without an anchor."""
        if now_ms is None:
            now_ms = self._read_anchor()
        pause_s = self.backend.pause_s
        while now_ms is not None and now_ms > self.limit_ms:
            started_s = time.monotonic()
            time.sleep(pause_s)
            now_ms = self._read_anchor()
            if now_ms is not None:
                self._lose(time.monotonic() - started_s, now_ms)
            pause_s = min(pause_s * PAUSE_GROWTH, LONGEST_PAUSE_S)
        return now_ms

    def _read_anchor(self) -> float | None:
        if self.anchor is None:
            return None
        now_ms = float(np.median(self._run(self.anchor)))
        self.best_ms = min(self.best_ms, now_ms)
        return now_ms

    def _lose(self, seconds: float, now_ms: float) -> None:
        if not self.lost_s:
            log.info(
                "%s is in a slow phase: its anchor network takes %.4g ms, at best %.4g; visits are repeated until it "
                "is over, up to %.0f s in all",
                self.backend.device,
                now_ms,
                self.best_ms,
                self.backend.patience_s,
            )
        self.lost_s += seconds
        if self.lost_s > self.backend.patience_s:
            anew = f"; if it has truly become slower, delete {self.record}" if self.record else ""
            raise _Failed(
                f"the device is too slow just now to be measured: its anchor network takes {now_ms:.4g} ms, the best "
                f"was {self.best_ms:.4g} ms and at most {TOLERANCE} times that is accepted; {self.lost_s:.0f} s were "
                "lost to slow phases. Stop other work on it, let it cool down, fix its clock, or measure without an "
                f"anchor (anchor: false){anew}",
                is_noise=True,
            )

    def _run(self, subject: _Subject) -> tuple[float, ...]:
        """The runs that the command printed for a model; raises _Failed when no try gave any."""
        settings, attempt = self.backend.settings, 1
        while True:
            try:
                return parse_latencies_ms(run_command(subject.arguments, settings.timeout_s))
            except CommandFailed as error:
                if attempt > settings.retries or isinstance(error, CommandNotFound):
                    raise self._failed(subject, attempt, error) from None
                log.warning(
                    "%s, %s, try %d: %s; trying again", self.backend.device, self._title(subject), attempt, error
                )
            time.sleep(self.backend.pause_s)
            attempt += 1

    def _failed(self, subject: _Subject, tries: int, error: CommandFailed) -> _Failed:
        message = f"{self._title(subject)}, try {tries}: {error}"
        if subject is not self.anchor:
            return _Failed(message, subject.name)
        if not isinstance(error, CommandNotFound):
            message += (
                "; if the command is right and only this float network fails, measure without an anchor (anchor: false)"
            )
        return _Failed(message)

    def _title(self, subject: _Subject) -> str:
        return "the anchor network" if subject is self.anchor else f"model {subject.name!r}"

    # an unfinished measurement ----------------------------------------------------------------------------

    def _made_with(self) -> str:
        """A digest of what must be equal for visits to be gone on from."""
        backend, anchor = self.backend, self.anchor.digest if self.anchor else None
        same = [backend.settings.command, anchor, backend.device, backend.runtime, backend.threads, backend.hardware]
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()

    def _save(self) -> None:
        if self.record is None:
            return
        visits = {s.digest: [[v.anchor_ms, list(v.runs_ms)] for v in s.visits] for s in self.subjects}
        best_ms = self.best_ms if self.anchor else None
        made_with = self._made_with()
        write_json(self.record, {"schema": RECORD_SCHEMA, "made_with": made_with, "best_ms": best_ms, "visits": visits})

    def resume(self) -> None:
        """Take up the visits of the record, if they were made by this command; raises ValueError for another file."""
        if self.record is None or not self.record.exists():
            return
        data: dict[str, Any] = read_json(self.record)
        try:
            if data["schema"] != RECORD_SCHEMA:
                raise ValueError(f"schema {data['schema']}, expected {RECORD_SCHEMA}")
            if data["made_with"] != self._made_with():
                log.warning("%s is of another device, command or runtime: its visits are not used", self.record)
                return
            for subject in self.subjects:
                visits = data["visits"].get(subject.digest, [])
                subject.visits = [
                    Visit(tuple(map(float, runs_ms)), None if anchor_ms is None else float(anchor_ms))
                    for anchor_ms, runs_ms in visits
                ]
            self.best_ms = float("inf") if self.anchor is None else float(data["best_ms"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{self.record} is not a record of visits ({error}); delete it") from None
