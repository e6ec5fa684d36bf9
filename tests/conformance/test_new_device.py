"""Every family of spaces is learned from ten measurements of a device that was made up."""

from __future__ import annotations

import numpy as np
import pytest

from hardware_profiles import AdditiveModel, features
from predictors import NewDevicePredictor, choose_networks
from search_spaces import FAMILIES, build_space

ROUND_MS = {"count": 2e-3, "macs": 1e-7, "bytes": 1e-7, "weight_bytes": 3e-8}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("int8_over_fp32", [0.3, 3.0])
def test_ten_measurements_are_enough(family: str, int8_over_fp32: float) -> None:
    space, rng = build_space(family, {}), np.random.default_rng(0)
    networks = [space.lower(space.sample(rng)) for _ in range(60)]
    amounts = [features(network) for network in networks]
    prices = {}
    for name in sorted({name for row in amounts for name in row}):
        _, precision, quantity = name.split(".")
        faster = int8_over_fp32 if (precision, quantity) == ("int8", "macs") else 1.0
        prices[name] = ROUND_MS[quantity] * faster * float(rng.lognormal(0, 0.5))
    device = AdditiveModel(prices, 0.01)
    latency_ms = np.array([device.latency_ms(one) for one in networks]) * np.exp(rng.normal(0, 0.02, len(networks)))
    chosen = choose_networks(networks, 10, 0)
    predictor = NewDevicePredictor().fit(networks, chosen, latency_ms[chosen])
    predicted_ms = np.array([one.mean_ms for one in predictor.predict(networks)])
    assert np.median(np.abs(predicted_ms / latency_ms - 1)) < 0.06
    assert np.corrcoef(np.log(predicted_ms), np.log(latency_ms))[0, 1] > 0.97
