"""What networks run on: device profiles, and what a network costs there in time and memory."""

from hardware_profiles.cost_model import AdditiveModel, Prediction, UnsupportedLayer, features
from hardware_profiles.device import (
    DeviceProfile,
    InvalidProfile,
    LatencyModel,
    UnavailableCost,
    UnknownDevice,
    device_names,
    is_device_file,
    is_shipped,
    load_device,
)
from hardware_profiles.latency_table import LatencyTable, Predictions
from hardware_profiles.memory import PLANNERS, UnknownPlanner, flash_bytes, peak_sram_bytes

__all__ = [
    "PLANNERS",
    "AdditiveModel",
    "DeviceProfile",
    "InvalidProfile",
    "LatencyModel",
    "LatencyTable",
    "Prediction",
    "Predictions",
    "UnavailableCost",
    "UnknownDevice",
    "UnknownPlanner",
    "UnsupportedLayer",
    "device_names",
    "features",
    "flash_bytes",
    "is_device_file",
    "is_shipped",
    "load_device",
    "peak_sram_bytes",
]
