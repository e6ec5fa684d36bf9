"""What can be built: architectures, networks and the spaces they come from."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping

from search_spaces.compact_transformer import CompactTransformer
from search_spaces.layers import INPUT, KINDS, InvalidNetwork, Layer, Network, keeps_quantization
from search_spaces.mobilenet import MobileNet
from search_spaces.precision import FP32, INT8, PRECISIONS, Precision, precision_of
from search_spaces.space import Architecture, Choice, InvalidArchitecture, SearchSpace, Slot

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
    "InvalidArchitecture",
    "InvalidNetwork",
    "Layer",
    "MobileNet",
    "Network",
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

    Raises UnknownSpace for the family and ValueError for a setting, each with the nearest known name.
    """
    if family not in FAMILIES:
        raise UnknownSpace(f"unknown space {family!r}{_nearest(family, FAMILIES)}")
    known = inspect.signature(FAMILIES[family].__init__).parameters
    for key in settings:
        if key not in known or key == "self":
            raise ValueError(f"space {family}: unknown setting {key!r}{_nearest(key, known)}")
    return FAMILIES[family](**settings)  # type: ignore[arg-type]


def _nearest(name: str, known: Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(n for n in known if n != 'self')}"
