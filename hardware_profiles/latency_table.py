"""Latencies of a million architectures at once: an additive model, compiled for a space."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hardware_profiles.cost_model import AdditiveModel, UnsupportedLayer
from search_spaces import CostTable, Layer, Precision, SearchSpace
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

    Equal to lowering and predicting each network, but for the order in which floats are added.

    Args:
        space: whose architectures.
        model: of the device.
        relative_error: half the 90 % interval over the prediction; None where it is not known.
        precisions: kind of layer -> names of the precisions it may have there; None where all may.
    """

    def __init__(
        self,
        space: SearchSpace,
        model: AdditiveModel,
        relative_error: float | None = None,
        precisions: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.model = model
        self.relative_error = relative_error
        self.precisions = precisions
        self._table = CostTable(space, self._slot_ms)

    def predict(self, codes: np.ndarray) -> Predictions:
        """Predictions for codes (n, number of choices); raises ValueError for another shape or a code out of range."""
        mean_ms = self._table.costs(codes)[:, 0] + self.model.constant_ms
        if self.relative_error is None:
            return Predictions(mean_ms, None, None)
        low_ms = mean_ms * max(1 - self.relative_error, 0.0)
        return Predictions(mean_ms, low_ms, mean_ms * (1 + self.relative_error))

    def _slot_ms(self, layers: Sequence[Layer], fed_with: Precision) -> tuple[float]:
        if self.precisions is not None:
            legal = (layer.precision.name in self.precisions.get(layer.kind, ()) for layer in layers)
            if not all(legal):
                return (math.inf,)
        try:
            return (self.model.layers_ms(layers, {PREV: fed_with.is_quantized, INPUT: False}),)
        except UnsupportedLayer:
            return (math.inf,)
