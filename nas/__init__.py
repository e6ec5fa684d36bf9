"""Fitnest: train a once-for-all supernet, search it under hardware limits, export what was chosen."""

from nas.config import BadExperiment, Experiment, load_experiment
from nas.costs import (
    Figure,
    Infeasible,
    Limit,
    Objective,
    ProfiledDevice,
    UnknownFigure,
    at_least,
    at_most,
    maximize,
    minimize,
    parse_limit,
    parse_objective,
)
from nas.data import BadData, Data, from_arrays, load_data
from nas.evaluate import accuracy, recalibrate
from nas.export import ExportFailed, export
from nas.front import Evaluation, ParetoFront
from nas.profile import profile
from nas.quantize import Quantized, quantize
from nas.remeasure import remeasure
from nas.sampling import sample_spread
from nas.search import Evaluator, SearchSettings, search
from nas.supernet import Subnet, Supernet
from nas.train import TrainingDiverged, TrainSettings, train

__all__ = [
    "BadData",
    "BadExperiment",
    "Data",
    "Evaluation",
    "Evaluator",
    "Experiment",
    "ExportFailed",
    "Figure",
    "Infeasible",
    "Limit",
    "Objective",
    "ParetoFront",
    "ProfiledDevice",
    "Quantized",
    "SearchSettings",
    "Subnet",
    "Supernet",
    "TrainSettings",
    "TrainingDiverged",
    "UnknownFigure",
    "accuracy",
    "at_least",
    "at_most",
    "export",
    "from_arrays",
    "load_data",
    "load_experiment",
    "maximize",
    "minimize",
    "parse_limit",
    "parse_objective",
    "profile",
    "quantize",
    "recalibrate",
    "remeasure",
    "sample_spread",
    "search",
    "train",
]
