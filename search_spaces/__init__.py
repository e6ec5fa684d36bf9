"""What can be built: architectures, networks and the spaces they come from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Mapping

from search_spaces.compact_transformer import CompactTransformer
from search_spaces.cost_table import CostTable
from search_spaces.layers import INPUT, KINDS, InvalidNetwork, Layer, Network, keeps_quantization
from search_spaces.mobilenet import MobileNet
from search_spaces.precision import FP32, INT8, PRECISIONS, Precision, precision_of
from search_spaces.space import RESTRICT, Architecture, Choice, InvalidArchitecture, NotScalable, SearchSpace, Slot

FAMILIES: Mapping[str, type[SearchSpace]] = {
    "mobilenet": MobileNet,
    "compact_transformer": CompactTransformer,
}

__all__ = [
    "FAMILIES",
    "FP32",
    "INPUT",
    "INT8",
    "KINDS",
    "PRECISIONS",
    "Architecture",
    "Choice",
    "CompactTransformer",
    "CostTable",
    "InvalidArchitecture",
    "InvalidNetwork",
    "Layer",
    "MobileNet",
    "Network",
    "NotScalable",
    "Precision",
    "SearchSpace",
    "Slot",
    "UnknownSpace",
    "build_space",
    "keeps_quantization",
    "precision_of",
]


class UnknownSpace(LookupError):
    """A family that is not registered in `FAMILIES`."""


def build_space(family: str, settings: Mapping[str, object]) -> SearchSpace:
    """The space of a family with these settings.

    Every family takes the setting `restrict` besides its own: the options to keep of the choices it names, such as
    `{"stage1.depth": [2]}` (see `SearchSpace.restricted`).

    Raises UnknownSpace for the family and ValueError for a setting, each with the nearest known name.
    """
    if family not in FAMILIES:
        raise UnknownSpace(f"unknown space {family!r}{_nearest(family, FAMILIES)}")
    known = [name for name in (*inspect.signature(FAMILIES[family].__init__).parameters, RESTRICT) if name != "self"]
    for key in settings:
        if key not in known:
            raise ValueError(f"space {family}: unknown setting {key!r}{_nearest(key, known)}")
    space = FAMILIES[family](**{key: value for key, value in settings.items() if key != RESTRICT})  # type: ignore[arg-type]
    restrict = settings.get(RESTRICT, {})
    if not isinstance(restrict, Mapping) or not all(isinstance(name, str) for name in restrict):
        raise ValueError(f"space {family}: {RESTRICT} = {restrict!r}: expected the options to keep, by choice")
    return space.restricted(restrict) if restrict else space


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
