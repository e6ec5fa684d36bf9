"""What a network will cost, learned from measurements."""

from hardware_profiles.cost_model import Prediction, UnsupportedLayer
from predictors.latency import LatencyPredictor, NotFitted
from predictors.plan import most_uncertain

__all__ = ["LatencyPredictor", "NotFitted", "Prediction", "UnsupportedLayer", "most_uncertain"]
