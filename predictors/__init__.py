"""What a network will cost, learned from measurements."""

from __future__ import annotations

import json
from pathlib import Path

from hardware_profiles.cost_model import Prediction, UnsupportedLayer
from predictors.code_tables import CodeTables
from predictors.latency import LatencyPredictor, NotFitted
from predictors.new_device import NewDevicePredictor
from predictors.plan import most_uncertain
from predictors.prices import KnownDevice, choose_networks
from predictors.transfer import Latencies, TransferredPredictor, choose_samples

__all__ = [
    "CodeTables",
    "KnownDevice",
    "Latencies",
    "LatencyPredictor",
    "NewDevicePredictor",
    "NotFitted",
    "Prediction",
    "TransferredPredictor",
    "UnsupportedLayer",
    "choose_networks",
    "choose_samples",
    "load_predictor",
    "most_uncertain",
]


def load_predictor(path: str | Path) -> LatencyPredictor | NewDevicePredictor:
    """A predictor of either kind, as its `save` wrote it; raises ValueError, saying what is wrong, for another file."""
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a saved latency predictor") from None
    is_new = isinstance(document, dict) and document.get("schema") == NewDevicePredictor.SCHEMA
    return (NewDevicePredictor if is_new else LatencyPredictor).load(path)
