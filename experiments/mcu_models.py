"""Latency and energy of boards that share kernels: cost ratios for all of them, times one speed a board.

Four networks on a board cannot tell eight coefficients apart. But the kernels of a library do the same work on every
board, so that the ratios of their costs are fitted to all boards together, and shrunk towards what is known of them:
the instructions of CMSIS-NN's int8 kernels. Each board then adds one number, the time it takes for that work.

Notation: n runs, d columns (kinds of work), `matrix` (n, d) amounts of work, `board` (n,) the number of the board.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mcu_data import Run

from predictors.regression import relative_interval

# Instructions of CMSIS-NN's int8 kernels on a Cortex-M4 (with DSP instructions), per unit of a feature. They lie within
# what was counted on an emulated core (QEMU 7.2, GCC 12.2 -O3): a wide 1x1 convolution 1.6 a MAC and one from 8 to 48
# channels 6.6, a 3x3 first layer 4.2 to 6.2, a depthwise one 7.7 to 9.9, a linear layer 2.1 to 2.9, an addition 81 an
# element (three bytes), a mean 7 an element; and they give the counted totals of the four MLPerf Tiny networks to 6 %.
INSTRUCTIONS = (
    {"conv.int8.macs": 1.6},
    {"pointwise.int8.macs": 1.3},
    {"depthwise.int8.macs": 7.8, "depthwise.int8.bytes": 3.0},
    {"linear.int8.macs": 2.1, "linear.int8.bytes": 10.0},
    {"conv.int8.bytes": 36.0, "pointwise.int8.bytes": 36.0},
    {"add.int8.bytes": 27.0, "average_pool.int8.bytes": 7.0},
)
COUNTED = {"ad": 0.58e6, "ic": 29.87e6, "kws": 7.84e6, "vww": 24.71e6}  # instructions of the whole networks

COMPUTING = ("conv.int8", "pointwise.int8", "depthwise.int8", "linear.int8")
MOVING = (*COMPUTING, "add.int8", "average_pool.int8")
FREE = ("reshape.int8.count", "quantize.int8.count")  # a view; and the image, which these devices get as integers
FLASH = {f"{family}.weight_bytes": 1.0 for family in COMPUTING}

RIDGE = 0.03  # of squared relative error a run; a third or three times of it changes the errors by less than 0.02
FIXED_RIDGE = 1e6  # leaves the ratios where they were expected
ITERATIONS, TOLERANCE = 200, 1e-9


@dataclass(frozen=True)
class Form:
    """What a model of some kernels is made of.

    columns: kinds of work, each a price list of features. Their ratios are expected to be 1, and `ridge` says how
    strongly they are held there, in squared relative error a run; 0 is not at all.
    """

    columns: tuple[Mapping[str, float], ...]
    ridge: float

    def row(self, features: Mapping[str, float]) -> list[float]:
        return [sum(price * features.get(name, 0.0) for name, price in column.items()) for column in self.columns]


# Seven or eight networks on one board tell two coefficients apart with nothing known of the kernels.
TWO_PRICES = Form(
    ({f"{family}.macs": 1.0 for family in COMPUTING}, {f"{family}.bytes": 1.0 for family in MOVING}), ridge=0.0
)
# Of CMSIS-NN's kernels the instructions are known, with those that load weights. Faster ones wait for the flash as
# well, which shows in networks with many weights for their MACs: an instruction's time a byte is expected.
COUNTED_KERNELS = Form(INSTRUCTIONS, RIDGE)
OTHER_KERNELS = Form((*INSTRUCTIONS, FLASH), RIDGE)
NOTHING_FITTED = Form(INSTRUCTIONS, FIXED_RIDGE)
FORMS = {
    "tflm-reference": TWO_PRICES,
    "tinyengine": TWO_PRICES,
    "cmsis-nn": COUNTED_KERNELS,
    "tflm-2.3.1": COUNTED_KERNELS,
    "x-cube-ai-7": OTHER_KERNELS,
    "plumerai": OTHER_KERNELS,
    "microtvm": OTHER_KERNELS,
}


@dataclass(frozen=True)
class SharedModel:
    """Ratios (d,) of the kinds of work, and milliseconds for a unit of work on each board."""

    form: Form
    ratios: np.ndarray
    ms_per_unit: Mapping[str, float]

    def predict_ms(self, board: str, features: Mapping[str, float]) -> float:
        return float(np.dot(self.form.row(features), self.ratios)) * self.ms_per_unit[board]

    def coefficients_ms(self, board: str) -> dict[str, float]:
        """Milliseconds per unit of each feature on a board; what costs nothing is there with a price of 0."""
        prices = {name: 0.0 for column in self.form.columns for name in column} | dict.fromkeys(FREE, 0.0)
        for column, ratio in zip(self.form.columns, self.ratios, strict=True):
            for name, price in column.items():
                prices[name] += price * float(ratio) * self.ms_per_unit[board]
        return prices


def fit_shared(runs: Sequence[Run], form: Form) -> SharedModel:
    """Fit by turns: the speed of each board for given ratios, then non-negative ratios for given speeds.

    Both minimise the squared relative error. Boards without runs have no speed.
    """
    from scipy.optimize import nnls

    boards = sorted({run.board for run in runs})
    board = np.array([boards.index(run.board) for run in runs])
    latency = np.array([run.latency_ms for run in runs])
    relative = np.array([form.row(run.features) for run in runs]) / latency[:, None]
    held = np.sqrt(form.ridge * len(runs)) * np.eye(relative.shape[1])
    target = np.concatenate([np.ones(len(runs)), np.diag(held)])
    ratios = np.ones(relative.shape[1])
    for _ in range(ITERATIONS):
        work = relative @ ratios
        speeds = np.array([work[board == b].sum() / (work[board == b] ** 2).sum() for b in range(len(boards))])
        found = nnls(np.vstack([relative * speeds[board][:, None], held]), target, maxiter=100 * len(ratios))[0]
        moved, ratios = np.abs(found - ratios).max(), found
        if moved <= TOLERANCE * np.abs(ratios).max():
            break
    return SharedModel(form, ratios, dict(zip(boards, speeds.tolist(), strict=True)))


def predict_left_out_ms(runs: Sequence[Run], form: Form) -> np.ndarray:
    """Latency (n,) of each run by a model that saw its architecture on no board."""
    predicted = np.empty(len(runs))
    for architecture in {run.architecture for run in runs}:
        model = fit_shared([run for run in runs if run.architecture != architecture], form)
        for index, run in enumerate(runs):
            if run.architecture == architecture:
                predicted[index] = model.predict_ms(run.board, run.features)
    return predicted


def macs_left_out_ms(runs: Sequence[Run]) -> np.ndarray:
    """The baseline (n,): the MACs times one price a board.

    A line with a constant is no baseline here: with three networks to fit, it misses the fourth by up to sevenfold.
    """
    every = dict.fromkeys(TWO_PRICES.columns[0], 1.0)
    return predict_left_out_ms(runs, Form((every,), 0.0))


def instructions_left_out_ms(runs: Sequence[Run]) -> np.ndarray:
    """The counted instructions (n,) at one speed a board: nothing is fitted but the speed."""
    return predict_left_out_ms(runs, NOTHING_FITTED)


def covered(runs: Sequence[Run], predicted: np.ndarray, measured: np.ndarray) -> list[bool]:
    """Whether each value lies in the 90 % interval that the residuals of the other architectures give."""
    inside = []
    for index, run in enumerate(runs):
        others = np.array([other.architecture != run.architecture for other in runs])
        width, _ = relative_interval(predicted[others], measured[others])
        inside.append(bool(abs(measured[index] / predicted[index] - 1) <= width))
    return inside


def fit_power_mw(runs: Sequence[Run]) -> float:
    """Milliwatts of least squared relative error: microjoules over milliseconds."""
    ratio = np.array([run.latency_ms / float(run.energy_uj or 0.0) for run in runs])
    return float(ratio.sum() / (ratio**2).sum())


def energy_left_out_uj(runs: Sequence[Run], latency_ms: np.ndarray) -> np.ndarray:
    """Energy (n,): the power of the board without the architecture, times a latency (n,)."""
    predicted = np.empty(len(runs))
    for index, run in enumerate(runs):
        others = [other for other in runs if other.board == run.board and other.architecture != run.architecture]
        predicted[index] = fit_power_mw(others) * latency_ms[index]
    return predicted


def errors(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Mean and largest absolute error, as shares of what was measured."""
    error = np.abs(predicted / measured - 1)
    return {"mape": float(error.mean()), "max_error": float(error.max())}


def summary(runs: Sequence[Run], **predictions: np.ndarray) -> dict[str, Any]:
    """Errors of each prediction (n,) of the latencies, by its name."""
    measured = np.array([run.latency_ms for run in runs])
    return {name: errors(predicted, measured) for name, predicted in predictions.items()}
