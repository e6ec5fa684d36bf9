"""Fitnest: train a once-for-all supernet, search it under hardware limits, export what was chosen."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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
    from nas.evaluator import Evaluator
    from nas.export import ExportFailed, export
    from nas.front import Evaluation, ParetoFront
    from nas.guided_sampler import PredictorGuidedSampler
    from nas.profile import profile
    from nas.quantize import Quantized, quantize
    from nas.remeasure import remeasure
    from nas.sampling import sample_spread
    from nas.scaling import fit_device, scale
    from nas.search import SearchSettings, nested_front, search
    from nas.strategies import Pass, Step, Strategy
    from nas.supernet import Subnet, Supernet
    from nas.train import TrainingDiverged, train
    from nas.train_settings import TrainSettings
    from nas.trust import TrustReport, trust

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
    "Pass",
    "PredictorGuidedSampler",
    "ProfiledDevice",
    "Quantized",
    "SearchSettings",
    "Step",
    "Strategy",
    "Subnet",
    "Supernet",
    "TrainSettings",
    "TrainingDiverged",
    "TrustReport",
    "UnknownFigure",
    "accuracy",
    "at_least",
    "at_most",
    "export",
    "fit_device",
    "from_arrays",
    "load_data",
    "load_experiment",
    "maximize",
    "minimize",
    "nested_front",
    "parse_limit",
    "parse_objective",
    "profile",
    "quantize",
    "recalibrate",
    "remeasure",
    "sample_spread",
    "scale",
    "search",
    "train",
    "trust",
]

_HOMES = {
    "nas.config": ("BadExperiment", "Experiment", "load_experiment"),
    "nas.costs": (
        "Figure",
        "Infeasible",
        "Limit",
        "Objective",
        "ProfiledDevice",
        "UnknownFigure",
        "at_least",
        "at_most",
        "maximize",
        "minimize",
        "parse_limit",
        "parse_objective",
    ),
    "nas.data": ("BadData", "Data", "from_arrays", "load_data"),
    "nas.evaluate": ("accuracy", "recalibrate"),
    "nas.export": ("ExportFailed", "export"),
    "nas.front": ("Evaluation", "ParetoFront"),
    "nas.guided_sampler": ("PredictorGuidedSampler",),
    "nas.profile": ("profile",),
    "nas.quantize": ("Quantized", "quantize"),
    "nas.remeasure": ("remeasure",),
    "nas.sampling": ("sample_spread",),
    "nas.scaling": ("fit_device", "scale"),
    "nas.evaluator": ("Evaluator",),
    "nas.search": ("SearchSettings", "nested_front", "search"),
    "nas.strategies": ("Pass", "Step", "Strategy"),
    "nas.supernet": ("Subnet", "Supernet"),
    "nas.train": ("TrainingDiverged", "train"),
    "nas.train_settings": ("TrainSettings",),
    "nas.trust": ("TrustReport", "trust"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


class _Package(ModuleType):
    """The package, whose names are imported when first used: `nas --help` should not wait for torch."""

    def __getattr__(self, name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'nas' has no attribute {name!r}")
        return getattr(import_module(_HOME_OF[name]), name)

    def __setattr__(self, name: str, value: object) -> None:
        # importing the module nas.search must not hide the function nas.search
        if not (name in _HOME_OF and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})


sys.modules[__name__].__class__ = _Package
