"""Latencies of a million architectures at once: an additive model, compiled for a space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hardware_profiles.cost_model import AdditiveModel, UnsupportedLayer
from search_spaces import CostTable, Layer, Network, Precision, SearchSpace
from search_spaces.layers import INPUT, PREV


@dataclass(frozen=True, slots=True)
class Predictions:
    """Predicted latencies in ms, each of shape (n,); infinite where the device cannot run an architecture, or where no
    measurement covers one of its layers. `low_ms` and `high_ms` bound the 90 % interval, None where it is not known."""

    mean_ms: np.ndarray
    low_ms: np.ndarray | None
    high_ms: np.ndarray | None


class LatencyTable:
    """The latencies of a model for the architectures of a space, given as codes.

    Equal to lowering and predicting each network, but for the order in which floats are added. What the halos of a
    patch stage cost is not a sum over slots: an architecture that runs in patches is lowered.

    Args:
        space: whose architectures.
        model: of the device.
        relative_error: half the 90 % interval over the prediction; None where it is not known.
        is_legal: whether the device can run a layer; None where it can run all.
    """

    def __init__(
        self,
        space: SearchSpace,
        model: AdditiveModel,
        relative_error: float | None = None,
        is_legal: Callable[[Layer], bool] | None = None,
    ) -> None:
        self.space = space
        self.model = model
        self.relative_error = relative_error
        self.is_legal = is_legal
        self._table = CostTable(space, self._slot_ms)

    def predict(self, codes: np.ndarray) -> Predictions:
        """Predictions for codes (n, number of choices); raises ValueError for another shape or a code out of range."""
        mean_ms = self._table.costs(codes)[:, 0] + self.model.constant_ms
        for row in np.flatnonzero(np.isnan(mean_ms)):
            mean_ms[row] = self._network_ms(self.space.lower(self.space.from_codes(codes[row])))
        if self.relative_error is None:
            return Predictions(mean_ms, None, None)
        share = max(1 - self.relative_error, 0.0)
        low_ms = mean_ms * share if share else np.where(np.isinf(mean_ms), mean_ms, 0.0)  # infinity times 0 is nothing
        return Predictions(mean_ms, low_ms, mean_ms * (1 + self.relative_error))

    def _slot_ms(self, layers: Sequence[Layer], fed_with: Precision) -> tuple[float]:
        if self.is_legal is not None and not all(map(self.is_legal, layers)):
            return (math.inf,)
        if any(layer.patches > 1 for layer in layers):
            return (math.nan,)
        try:
            return (self.model.layers_ms(layers, {PREV: fed_with.is_quantized, INPUT: False}),)
        except UnsupportedLayer:
            return (math.inf,)

    def _network_ms(self, network: Network) -> float:
        if self.is_legal is not None and not all(map(self.is_legal, network.layers)):
            return math.inf
        try:
            return self.model.latency_ms(network)
        except UnsupportedLayer:
            return math.inf
