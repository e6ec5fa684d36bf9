"""What was measured, and under which conditions: a latency without provenance does not exist."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a latency comes from. `precision` is fp32, int8 or mixed; `date` is UTC, ISO 8601, empty if not known.

    `cpu` is the processor, or what the user calls the hardware of a device that is not this machine. `anchor_ms`
    is what the anchor network took meanwhile: the state of the machine; None where there was none.
    """

    device: str
    runtime: str
    threads: int
    batch: int
    precision: str
    cpu: str
    date: str
    anchor_ms: float | None

    @property
    def key(self) -> tuple[str, str, int, int, str]:
        """What must be equal for latencies to be compared or fitted together."""
        return (self.device, self.runtime, self.threads, self.batch, self.cpu)


@dataclass(frozen=True, slots=True)
class Measurement:
    """The latency of one network.

    `latency_ms` is the 20 % quantile of the medians of the accepted rounds; `p50_ms` and `p95_ms` are over
    all their single runs, and `spread` is the scaled median absolute deviation of the round medians over
    their median, None where nobody knows it. `outliers` runs were dropped before.
    """

    latency_ms: float
    p50_ms: float
    p95_ms: float
    spread: float | None
    rounds: int
    runs_per_round: int
    provenance: Provenance
    outliers: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measurement:
        """Read back what `to_json` wrote; raises ValueError naming the fields that are missing or unknown."""
        _check_fields(cls, data)
        _check_fields(Provenance, data["provenance"])
        return cls(**{**data, "provenance": Provenance(**data["provenance"])})


def _check_fields(record: type, data: Any) -> None:
    known = {field.name for field in fields(record)}
    needed = {field.name for field in fields(record) if field.default is MISSING}  # files may be older than the rest
    found = set(data) if isinstance(data, Mapping) else set()
    if not needed <= found <= known:
        raise ValueError(
            f"not a {record.__name__}: missing {sorted(needed - found)}, unknown {sorted(found - known)}; measure again"
        )


def repeat_noise(first: Mapping[str, Measurement], second: Mapping[str, Measurement]) -> float:
    """Median over the networks in both of |a - b| / ((a + b) / 2): how well a measurement repeats.

    Raises ValueError when no network is in both.
    """
    pairs = [(first[name].latency_ms, second[name].latency_ms) for name in first if name in second]
    if not pairs:
        raise ValueError("the two measurements have no network in common")
    return median(abs(a - b) / ((a + b) / 2) for a, b in pairs)
