"""Latency predictors: fitted on measured networks, judged on networks left out, saved as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from hardware_profiles.cost_model import AdditiveModel, Prediction, features, predicted
from hardware_profiles.files import write_text
from hardware_profiles.latency_table import LatencyTable
from predictors.regression import (
    fit_coefficients,
    folds_of,
    matrix_of,
    predict_left_out,
    relative_interval,
    scores,
    with_constant,
)
from search_spaces import Network, SearchSpace

CHANNEL_BLOCKS = (1, 4, 8, 16, 32)  # channels that kernels may compute at once, from scalars to 1024 bits of floats
FEWEST_NETWORKS = 10  # nine are needed for a 90 % interval, and one to be left out


class NotFitted(RuntimeError):
    """The predictor was asked for something that only a fitted one has."""


class AdditivePredictor:
    """A fitted sum over layers, with an interval that is a share of the prediction to either side."""

    SCHEMA: ClassVar[str]
    VERSION: ClassVar[int]

    def __init__(self) -> None:
        self._model: AdditiveModel | None = None
        self._relative_error = 0.0
        self._report: dict[str, Any] = {}
        self._provenance: dict[str, Any] = {}

    @property
    def model(self) -> AdditiveModel:
        if self._model is None:
            raise NotFitted("this latency predictor is not fitted; call fit(networks, latency_ms) or load(path)")
        return self._model

    @property
    def provenance(self) -> dict[str, Any]:
        """How the latencies it was fitted on were measured."""
        _ = self.model
        return dict(self._provenance)

    def predict(self, networks: Iterable[Network]) -> list[Prediction]:
        """A prediction for each network; raises NotFitted, and UnsupportedLayer for a layer never measured."""
        model = self.model
        return [predicted(model.latency_ms(network), self._relative_error) for network in networks]

    def table(self, space: SearchSpace) -> LatencyTable:
        """The predictor compiled for a space: predictions for (n, number of choices) codes, a million in a second.

        Raises NotFitted. A layer never measured makes a prediction infinite there, since others may be fine.
        """
        return LatencyTable(space, self.model, self._relative_error)

    def report(self) -> dict[str, Any]:
        """Errors on networks left out of the fit, and those of a line through the MACs on the same folds.

        mape, median_error, max_error and within_10_percent are shares; relative_error_90 is half the interval; spearman
        is None where it is not defined, since all latencies or all predictions are equal.
        """
        _ = self.model
        return json.loads(json.dumps(self._report))

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": self.SCHEMA,
            "version": self.VERSION,
            "constant_ms": self.model.constant_ms,
            "channel_block": self.model.channel_block,
            "coefficients_ms": dict(self.model.coefficients),
            "relative_error_90": self._relative_error,
            "report": self._report,
            "provenance": self._provenance,
        }

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read back what `save` wrote; raises ValueError, saying what is wrong, for any other file."""
        document = _read(Path(path), cls.SCHEMA, cls.VERSION)
        try:
            predictor = cls._empty(document)
            coefficients = {str(name): float(value) for name, value in document["coefficients_ms"].items()}
            block = int(document["channel_block"])
            predictor._model = AdditiveModel(coefficients, float(document["constant_ms"]), block)
            predictor._relative_error = float(document["relative_error_90"])
            predictor._report = dict(document["report"])
            predictor._provenance = dict(document["provenance"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is a damaged latency predictor ({error!r}); fit it again") from None
        return predictor

    @classmethod
    def _empty(cls, document: Mapping[str, Any]) -> Self:
        """One that is not fitted, with the settings of a saved one."""
        return cls()


class LatencyPredictor(AdditivePredictor):
    """Latency as a sum over layers, with non-negative coefficients of least squared relative error.

    How many channels the kernels of the device compute at once is found where it is not given: of `CHANNEL_BLOCKS` the
    one that predicts networks left out best.

    The 90 % interval is a share of the prediction to either side, by conformal prediction on the residuals of
    cross-validation. It holds for networks drawn like those of the fit.

    Args:
        folds: parts of the cross-validation.
        seed: of the split into folds; the same measurements and seed give the same predictor.
        channel_block: channels that the device computes at once (`hardware_profiles.machine`); None where not known.
    """

    SCHEMA = "fitnest.latency_predictor"
    VERSION = 2

    def __init__(self, *, folds: int = 10, seed: int = 0, channel_block: int | None = None) -> None:
        if folds < 2:
            raise ValueError(f"expected at least two folds, got {folds}")
        if channel_block is not None and channel_block < 1:
            raise ValueError(f"expected blocks of one channel or more, got {channel_block}")
        super().__init__()
        self.folds = folds
        self.seed = seed
        self.channel_block = channel_block

    def fit(
        self,
        networks: Sequence[Network],
        latency_ms: Sequence[float] | np.ndarray,
        provenance: Mapping[str, Any] | None = None,
        *,
        representative: Sequence[bool] | None = None,
        groups: Sequence[object] | None = None,
    ) -> LatencyPredictor:
        """Fit on n networks and their latencies (n,), all measured under the conditions of `provenance`.

        `representative` (n,) marks the networks that were drawn like those to be predicted: errors and interval are
        theirs only, since networks picked for being uncertain say nothing about the others. By default all are.

        `groups` (n,) say which were measured together, in one process: what one process makes of all its networks
        differs from the next by about as much as networks from the model, so where there are five groups or more they
        are the folds, and errors and interval are those of networks measured at another time.

        Raises ValueError for fewer than 10 distinct networks, lengths that differ, or a latency that is not a
        positive number.
        """
        plain, latency = _Rows.of(networks, 0), np.asarray(latency_ms, dtype=np.float64)
        _check(plain.matrix, latency)
        fold = folds_of(plain.matrix, self.folds, np.random.default_rng(self.seed), groups)
        judged = np.ones(len(latency), bool) if representative is None else np.asarray(representative, bool)
        _check_judged(judged, plain.matrix)
        blocks = CHANNEL_BLOCKS if self.channel_block is None else (self.channel_block,)
        tried = [_Rows.of(networks, block) for block in blocks]
        predictions = [rows.left_out(latency, fold) for rows in tried]
        best = int(np.argmin([np.square(each / latency - 1).mean() for each in predictions]))
        left_out = predictions[best][judged]
        self._model = tried[best].model(latency)
        self._relative_error, _ = relative_interval(left_out, latency[judged])
        macs = with_constant(np.array([[float(network.macs)] for network in networks]))
        self._report = {
            "networks": len(latency),
            "judged_on": int(judged.sum()),
            "folds": int(fold.max()) + 1,
            "channel_block": self._model.channel_block,
            **scores(left_out, latency[judged]),
            "relative_error_90": self._relative_error,
            "macs_only": scores(predict_left_out(macs, latency, fold)[judged], latency[judged]),
        }
        self._provenance = dict(provenance or {})
        return self

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "folds": self.folds, "seed": self.seed}

    @classmethod
    def _empty(cls, document: Mapping[str, Any]) -> Self:
        block = int(document["channel_block"])
        return cls(folds=int(document["folds"]), seed=int(document["seed"]), channel_block=block)


@dataclass(frozen=True)
class _Rows:
    """Features of n networks (n, d) with their names, for kernels that compute so many channels at once."""

    channel_block: int
    names: tuple[str, ...]
    matrix: np.ndarray

    @classmethod
    def of(cls, networks: Sequence[Network], channel_block: int) -> _Rows:
        rows = [features(network, channel_block) for network in networks]
        names = tuple(sorted({name for row in rows for name in row}))
        return cls(channel_block, names, matrix_of(rows, names))

    def left_out(self, latency_ms: np.ndarray, fold: np.ndarray) -> np.ndarray:
        return predict_left_out(with_constant(self.matrix), latency_ms, fold)

    def model(self, latency_ms: np.ndarray) -> AdditiveModel:
        *coefficients, constant = fit_coefficients(with_constant(self.matrix), latency_ms).tolist()
        return AdditiveModel(dict(zip(self.names, coefficients, strict=True)), constant, self.channel_block)


def _check(matrix: np.ndarray, latency: np.ndarray) -> None:
    if latency.ndim != 1 or len(latency) != len(matrix):
        raise ValueError(f"expected one latency for each of {len(matrix)} networks, got shape {latency.shape}")
    if not (np.isfinite(latency).all() and (latency > 0).all()):
        raise ValueError(f"expected positive latencies in ms, got {latency[~(latency > 0)][:3].tolist() or 'infinity'}")
    distinct = len(np.unique(matrix, axis=0)) if matrix.size else 0
    if distinct < FEWEST_NETWORKS:
        raise ValueError(f"expected at least {FEWEST_NETWORKS} distinct networks to fit on, got {distinct}")


def _check_judged(judged: np.ndarray, matrix: np.ndarray) -> None:
    if judged.shape != (len(matrix),):
        raise ValueError(f"expected one mark for each of {len(matrix)} networks, got shape {judged.shape}")
    distinct = len(np.unique(matrix[judged], axis=0))
    if distinct < FEWEST_NETWORKS:
        raise ValueError(f"expected at least {FEWEST_NETWORKS} distinct representative networks, got {distinct}")


def _read(path: Path, schema: str, version: int) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); expected a saved latency predictor") from None
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise ValueError(f"{path} is not a saved latency predictor; expected a JSON object with schema {schema!r}")
    if document.get("version") != version:
        raise ValueError(
            f"{path} is a latency predictor of version {document.get('version')!r}, this program reads {version}; "
            "fit it again"
        )
    return document
