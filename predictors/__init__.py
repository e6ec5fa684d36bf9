"""What a network will cost, learned from measurements."""

from hardware_profiles.cost_model import Prediction, UnsupportedLayer
from predictors.code_tables import CodeTables
from predictors.latency import LatencyPredictor, NotFitted
from predictors.plan import most_uncertain
from predictors.transfer import Latencies, TransferredPredictor, choose_samples

__all__ = [
    "CodeTables",
    "Latencies",
    "LatencyPredictor",
    "NotFitted",
    "Prediction",
    "TransferredPredictor",
    "UnsupportedLayer",
    "choose_samples",
    "most_uncertain",
]
