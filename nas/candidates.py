"""What architectures cost without being run, and which of them a search may consider."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

from nas.costs import (
    ALWAYS,
    Figure,
    Figures,
    Infeasible,
    Item,
    Limit,
    Objective,
    ProfiledDevice,
    cheap_figures,
    check_devices,
)
from nas.figure_table import FigureTable
from search_spaces import PRECISIONS, Architecture, Network, SearchSpace
from search_spaces.space import Value

WEIGHTED = ("conv2d", "linear")


def devices_of(
    items: Sequence[Item], devices: Mapping[str, ProfiledDevice] | Iterable[ProfiledDevice]
) -> dict[str, ProfiledDevice]:
    """The devices that objectives and limits name, by name: those that they carry, and those among `devices`.

    Raises UnknownFigure for a figure that its device does not have, ValueError for two devices of one name.
    """
    known = {device.name: device for device in (devices.values() if isinstance(devices, Mapping) else devices)}
    for item in items:
        if item.profiled is not None:
            held = known.setdefault(item.profiled.name, item.profiled)
            if held.key != item.profiled.key:
                raise ValueError(f"{item.key}: two different devices are called {item.device!r}; rename one profile")
    check_devices(items, known)
    named = {item.device for item in items}
    return {name: device for name, device in known.items() if name in named}


class Costs:
    """What architectures cost without being run, and which of them the limits and the devices allow.

    Args:
        devices: those that objectives and limits name.

    Raises Infeasible when the devices have no precision of the space in common.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        limits: Sequence[Limit],
        devices: Mapping[str, ProfiledDevice],
    ) -> None:
        self.space, self.objectives, self.devices = space, tuple(objectives), dict(devices)
        own = [limit for device in devices.values() for limit in device.memory_limits]
        self.limits = tuple(dict.fromkeys([*limits, *own]))
        items: list[Item] = [*self.objectives, *self.limits]
        self.keys = tuple(dict.fromkeys([*(item.key for item in items), *ALWAYS]))
        self.options = self._legal_options()
        genes = [choice.name for choice in space.choices if choice.role == "precision"]
        self.precisions = tuple(dict.fromkeys(str(o) for name in genes for o in self.options[name])) or ("",)

    def _legal_options(self) -> dict[str, tuple[Value, ...]]:
        """The options of each choice: precisions that every device has for all layers with weights, and more than one
        patch only where every device can run patches."""
        legal = {
            name
            for name in PRECISIONS
            if all(name in d.profile.precisions.get(kind, ()) for d in self.devices.values() for kind in WEIGHTED)
        }
        whole = [name for name, device in self.devices.items() if not device.profile.patches]
        options = {
            choice.name: tuple(
                o
                for o in choice.options
                if (choice.role != "precision" or o in legal) and (choice.role != "patches" or o == 1 or not whole)
            )
            for choice in self.space.choices
        }
        lacking = [name for name, left in options.items() if not left]
        if lacking:
            offered = self.space.choice(lacking[0]).options
            if self.space.choice(lacking[0]).role == "patches":
                raise Infeasible(
                    f"no architecture is legal on {', '.join(whole)}, which runs no layers patch by patch: the space "
                    f"offers {', '.join(map(str, offered))} patches a side; add 1 to space.patches"
                )
            raise Infeasible(
                f"no architecture is legal on {', '.join(self.devices)}: "
                f"together they run {', '.join(sorted(legal)) or 'nothing'}, "
                f"the space offers {', '.join(map(str, offered))}; change space.precisions or the devices"
            )
        return options

    def legalize(self, architecture: Architecture) -> Architecture:
        """The architecture with each precision that is not legal replaced by the first that is."""
        return self.space.build({name: self.legal_value(architecture, name) for name in self.options})

    def legal_value(self, architecture: Architecture, name: str) -> Value:
        value, options = architecture[name], self.options[name]
        return value if value in options else options[0]

    def figures(self, network: Network) -> dict[str, Figure]:
        """All figures but accuracy; infinite on a device that cannot run the network."""
        return cheap_figures(network, self.keys, self.devices)

    def violations(self, network: Network, figures: Figures) -> dict[str, float]:
        """How far each limit is exceeded; 0 or less when met. Figures that are not known yet are not judged.

        The layers that a device cannot run count as `legal@DEVICE`, in place of its limits.
        """
        found = {}
        for name, device in self.devices.items():
            infinite = [k for k, f in figures.items() if k.partition("@")[2] == name and math.isinf(f.value)]
            found[f"legal@{name}"] = float(max(len(device.profile.illegal_layers(network)), len(infinite)))
        for limit in self.limits:
            if limit.key in figures and not found.get(f"legal@{limit.device}"):
                found[str(limit)] = limit.violation(figures[limit.key])
        return found

    @cached_property
    def table(self) -> FigureTable:
        return FigureTable(self.space, self.keys, self.devices)

    def of_codes(self, codes: np.ndarray) -> dict[str, np.ndarray]:
        """All figures but accuracy of n architectures (n, number of choices), by key, each (n,).

        For a limit at a confidence, under its text, the end of the interval that it is compared with. Equal to
        `figures` of each network; infinite on a device that cannot run it.
        """
        found = self.table.figures(codes)
        ends = {str(limit): found[limit.key].judged_by(limit) for limit in self.limits if limit.confidence is not None}
        return {key: estimates.value for key, estimates in found.items()} | ends

    def allowed(self, codes: np.ndarray) -> np.ndarray:
        """Which of n architectures (n, number of choices) all devices run and no limit refuses before they are run.

        Architectures are only lowered where bounds leave that open. Limits on what a simulator says are not judged.
        """
        return self.table.violation(codes, self.limits, most=0.0) <= 0

    def is_looked_up(self, key: str) -> bool:
        """Whether a figure of many architectures is known at once, without running or lowering each."""
        return key != "accuracy" and not self.table.is_lowered(key)

    def extremes(self) -> list[Architecture]:
        """The smallest and the largest architecture in each legal precision."""
        return [
            self.space.with_precision(end, p)
            for end in (self.space.smallest, self.space.largest)
            for p in self.precisions
        ]
