"""The latency of networks on a device of which only about ten were measured: `predictors.prices`, as a predictor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hardware_profiles.cost_model import AdditiveModel
from predictors.latency import AdditivePredictor
from predictors.prices import CONSTANT, Amounts, FittedPrices, KnownDevice, bases_of, fit_prices
from predictors.regression import predict_left_out, scores, with_constant
from search_spaces import Network

FEWEST_SAMPLES = 4


class NewDevicePredictor(AdditivePredictor):
    """Latency as a sum over layers, from few measurements of a new device and the price lists of known ones.

    The 90 % interval is a share of the prediction to either side: what the averaged models expect of a new measurement.
    """

    SCHEMA = "fitnest.new_device_predictor"
    VERSION = 3

    def fit(
        self,
        networks: Sequence[Network],
        chosen: Sequence[int] | np.ndarray,
        latency_ms: Sequence[float] | np.ndarray,
        known: Sequence[KnownDevice] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> NewDevicePredictor:
        """Fit on n networks of which those at the places `chosen` were measured.

        The report adds `sources`, how much of the fit stands around which known device. Samples chosen to be
        informative are unlike each other, so that their left-out errors are larger than those of other networks.

        A kernel in a precision that no sample has and no known device has a price for is not supported.

        Raises ValueError for fewer than four distinct samples, places that are none, or a latency that is not positive.
        """
        places, latency = np.asarray(chosen), np.asarray(latency_ms, float)
        _check(places, latency, len(networks))
        amounts = Amounts.of(networks)
        fitted = fit_prices(amounts, places, latency, bases_of(amounts, networks, known))
        self._model = _model(amounts, places, fitted, known)
        self._relative_error = fitted.relative_error
        macs = with_constant(np.array([[float(networks[place].macs)] for place in places]))
        self._report = {
            "networks": len(latency),
            "judged_on": len(latency),
            "folds": len(latency),
            **scores(fitted.left_out_ms, latency),
            "relative_error_90": fitted.relative_error,
            "macs_only": scores(predict_left_out(macs, latency, np.arange(len(latency))), latency),
            "sources": dict(fitted.sources),
        }
        self._provenance = dict(provenance or {})
        return self


def _model(amounts: Amounts, chosen: np.ndarray, fitted: FittedPrices, known: Sequence[KnownDevice]) -> AdditiveModel:
    """The prices of all kernels that a sample has or a known device."""
    sampled = {
        name.rpartition(".")[0]
        for name, column in zip(amounts.names, amounts.matrix.T, strict=True)
        if column[chosen].any()
    }
    prices = dict(zip(amounts.names, fitted.prices_ms.tolist(), strict=True))
    constant_ms = prices.pop(CONSTANT)
    kernels = {name.rpartition(".")[0] for name in prices}
    covered = {kernel for kernel in kernels if kernel in sampled or any(device.has(kernel) for device in known)}
    return AdditiveModel({name: ms for name, ms in prices.items() if name.rpartition(".")[0] in covered}, constant_ms)


def _check(chosen: np.ndarray, latency_ms: np.ndarray, networks: int) -> None:
    if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
        raise ValueError(f"expected the places that were measured, got {chosen.dtype} of shape {chosen.shape}")
    if latency_ms.shape != chosen.shape:
        raise ValueError(f"expected one latency for each of {len(chosen)} samples, got shape {latency_ms.shape}")
    if len(np.unique(chosen)) < max(FEWEST_SAMPLES, len(chosen)):
        raise ValueError(f"expected at least {FEWEST_SAMPLES} distinct samples, got {chosen.tolist()}")
    if chosen.min() < 0 or chosen.max() >= networks:
        raise ValueError(f"expected samples among networks 0 to {networks - 1}, got {chosen.tolist()}")
    if not (np.isfinite(latency_ms) & (latency_ms > 0)).all():
        raise ValueError(f"expected positive latencies in ms, got {latency_ms.tolist()}")
