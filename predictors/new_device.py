"""The latency of networks on a device of which only about ten were measured.

What known devices are predicted to take for a network, and its MACs, bytes and kernels, are put together by
`predictors.transfer` for the new device. A known device that has one precision only is asked as if the whole network
were in that one. All of it is a sum over layers of one coefficient or another, so it compiles to a cost table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware_profiles.cost_model import AdditiveModel, Prediction, UnsupportedLayer, features_of
from hardware_profiles.files import write_text
from hardware_profiles.latency_table import Predictions
from hardware_profiles.patches import computed_positions
from predictors.latency import NotFitted
from predictors.regression import predict_left_out, scores, with_constant
from predictors.transfer import TransferredPredictor
from search_spaces import FP32, INPUT, CostTable, Layer, Network, Precision, SearchSpace, precision_of
from search_spaces.layers import PREV, chain

SCHEMA = "fitnest.new_device_predictor"
VERSION = 1
AMOUNTS = ("macs", "bytes", "kernels")  # which serve as devices themselves
TINY = 1e-9  # so that an amount that a network has nothing of has a logarithm


@dataclass(frozen=True)
class KnownDevice:
    """A device with a model; `precision` is that in which it is asked about every network, "" for its own."""

    name: str
    model: AdditiveModel
    precision: str = ""

    def sums(self, layers: Sequence[Layer], source: str, fed_with: Precision, positions: Mapping[str, int]) -> float:
        """Milliseconds of layers that are fed with the tensor `source`, without the model's constant."""
        if self.precision:
            own = precision_of(self.precision)
            layers = tuple(replace(layer, precision=own) if layer.has_weights else layer for layer in layers)
            fed_with = FP32 if source == INPUT else own
            layers = chain(layers, source, fed_with)
        return self.model.layers_ms(layers, {source: fed_with.is_quantized}, positions)


class NewDevicePredictor:
    """Latency on a new device, from few measurements of it; predicts like a `LatencyPredictor`."""

    def __init__(self) -> None:
        self._known: tuple[KnownDevice, ...] = ()
        self._transferred: TransferredPredictor | None = None
        self._report: dict[str, Any] = {}

    @property
    def transferred(self) -> TransferredPredictor:
        if self._transferred is None:
            raise NotFitted("this predictor is not fitted; call fit(networks, chosen, latency_ms, known) or load(path)")
        return self._transferred

    @property
    def model(self) -> Mapping[str, Any]:
        """All that its predictions depend on."""
        return self.transferred.to_json()

    @property
    def provenance(self) -> dict[str, Any]:
        """How the latencies it was fitted on were measured."""
        return self.transferred.provenance

    def fit(
        self,
        networks: Sequence[Network],
        chosen: Sequence[int] | np.ndarray,
        latency_ms: Sequence[float] | np.ndarray,
        known: Sequence[KnownDevice],
        provenance: Mapping[str, Any] | None = None,
    ) -> NewDevicePredictor:
        """Fit on n networks of which those at the places `chosen` were measured.

        Known devices that cannot tell the latency of some network are left out. Raises ValueError for fewer than four
        samples, or latencies that are not positive.
        """
        known = usable(known, networks)
        rows = source_latencies(known, networks)
        names = [*(device.name for device in known), *AMOUNTS]
        transferred = TransferredPredictor().fit(rows, chosen, latency_ms, names=names, provenance=provenance)
        latency = np.asarray(latency_ms, float)
        told = transferred.report()
        macs = with_constant(rows[np.asarray(chosen)][:, [names.index("macs")]])
        self._known, self._transferred = tuple(known), transferred
        self._report = {
            "networks": len(latency),
            "judged_on": len(latency),
            "folds": len(latency),
            **told["left_out"],
            "relative_error_90": max(-told["interval"][0], told["interval"][1]),
            "interval": told["interval"],
            "macs_only": scores(predict_left_out(macs, latency, np.arange(len(latency))), latency),
            "sources": told["sources"],
        }
        return self

    def predict(self, networks: Iterable[Network]) -> list[Prediction]:
        """A prediction for each network; raises NotFitted, and UnsupportedLayer for a layer no known device has."""
        found = self._predicted(source_latencies(self._known, list(networks)))
        assert found.low_ms is not None
        assert found.high_ms is not None
        each = zip(found.mean_ms.tolist(), found.low_ms.tolist(), found.high_ms.tolist(), strict=True)
        return [Prediction(*three) for three in each]

    def table(self, space: SearchSpace) -> NewDeviceTable:
        """The predictor compiled for a space; see `LatencyPredictor.table`."""
        _ = self.transferred
        return NewDeviceTable(self, space)

    def report(self) -> dict[str, Any]:
        """Errors on each sample predicted from the others, beside those of a line through the MACs, as of
        `LatencyPredictor.report`; `interval` is relative to a prediction, `sources` says which devices it is like."""
        _ = self.transferred
        return json.loads(json.dumps(self._report))

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        known = [
            {
                "name": device.name,
                "precision": device.precision,
                "constant_ms": device.model.constant_ms,
                "coefficients_ms": dict(device.model.coefficients),
            }
            for device in self._known
        ]
        document = {"schema": SCHEMA, "version": VERSION, "known": known, "report": self._report}
        document["transferred"] = self.transferred.to_json()
        write_text(Path(path), json.dumps(document, indent=1, allow_nan=False) + "\n")

    @classmethod
    def from_json(cls, document: Mapping[str, Any], path: str | Path) -> NewDevicePredictor:
        """Read back what `save` wrote to `path`; raises ValueError for a damaged or newer file."""
        if document.get("version") != VERSION:
            raise ValueError(
                f"{path} is a predictor of version {document.get('version')!r}, this program reads {VERSION}; fit again"
            )
        found = cls()
        try:
            found._known = tuple(
                KnownDevice(str(one["name"]), _model(one), str(one["precision"])) for one in document["known"]
            )
            found._report = dict(document["report"])
            transferred = document["transferred"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged predictor ({error!r}); fit it again") from None
        found._transferred = TransferredPredictor.from_json(transferred, path)
        return found

    def _predicted(self, rows: np.ndarray) -> Predictions:
        """Rows (n, known devices and amounts) -> predictions; infinite where a row is not finite."""
        finite = np.isfinite(rows).all(axis=1)
        found = np.full((3, len(rows)), np.inf)
        if finite.any():
            predicted = self.transferred.predict(rows[finite])
            found[:, finite] = predicted.mean_ms, predicted.low_ms, predicted.high_ms
        return Predictions(*found)


class NewDeviceTable:
    """Predictions for codes (n, number of choices) of a space."""

    def __init__(self, predictor: NewDevicePredictor, space: SearchSpace) -> None:
        self.predictor, self.space = predictor, space
        self._constants = np.array([*(device.model.constant_ms for device in predictor._known), *[TINY] * len(AMOUNTS)])
        self._table = CostTable(space, self._slot, len(self._constants))
        self._first = space.slots[0].name

    def predict(self, codes: np.ndarray) -> Predictions:
        """Infinite where no known device has a layer; what runs in patches is lowered."""
        rows = self._table.costs(codes) + self._constants
        for row in np.flatnonzero(np.isnan(rows).any(axis=1)):
            network = self.space.lower(self.space.from_codes(codes[row]))
            try:
                rows[row] = _row(self.predictor._known, network)
            except UnsupportedLayer:
                rows[row] = math.inf
        return self.predictor._predicted(rows)

    def _slot(self, layers: Sequence[Layer], fed_with: Precision) -> list[float]:
        if any(layer.patches > 1 for layer in layers):
            return [math.nan] * len(self._constants)
        source = INPUT if any(INPUT in layer.inputs for layer in layers) else PREV
        try:
            return _sums(self.predictor._known, layers, source, fed_with, {})
        except UnsupportedLayer:
            return [math.inf] * len(self._constants)


def _model(document: Mapping[str, Any]) -> AdditiveModel:
    coefficients = {str(name): float(value) for name, value in document["coefficients_ms"].items()}
    return AdditiveModel(coefficients, float(document["constant_ms"]))


def usable(known: Iterable[KnownDevice], networks: Iterable[Network]) -> list[KnownDevice]:
    """The devices that can tell the latency of every network."""
    networks = list(networks)

    def can(device: KnownDevice) -> bool:
        try:
            return all(_row([device], network) for network in networks)
        except UnsupportedLayer:
            return False

    return [device for device in known if can(device)]


def source_latencies(known: Sequence[KnownDevice], networks: Sequence[Network]) -> np.ndarray:
    """What the known devices take for n networks, and their amounts: (n, devices + amounts), all positive."""
    return np.array([_row(known, network) for network in networks])


def _row(known: Sequence[KnownDevice], network: Network) -> list[float]:
    """Latencies on the known devices, and the amounts, of a network; all positive."""
    sums = _sums(known, network.layers, INPUT, FP32, computed_positions(network))
    constants = [*(device.model.constant_ms for device in known), *[TINY] * len(AMOUNTS)]
    return [total + constant for total, constant in zip(sums, constants, strict=True)]


def _sums(
    known: Sequence[KnownDevice],
    layers: Sequence[Layer],
    source: str,
    fed_with: Precision,
    positions: Mapping[str, int],
) -> list[float]:
    amounts = features_of(layers, {source: fed_with.is_quantized}, positions)

    def total(quantity: str) -> float:
        return sum(amount for name, amount in amounts.items() if name.endswith(f".{quantity}"))

    latencies = [device.sums(layers, source, fed_with, positions) for device in known]
    return [*latencies, total("macs"), total("bytes") + total("weight_bytes"), total("count")]
