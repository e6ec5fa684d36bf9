"""Choices, architectures and search spaces.

A space is an ordered tuple of choices (what can be decided) and an ordered tuple of slots (what the
decisions become). A slot reads a few choices and lowers their values to layers; lowering an architecture is
the concatenation of its slots. Everything else here (sampling, mutation, codes, parsing) is derived.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache
from math import prod
from operator import index
from typing import Self

import numpy as np

from search_spaces.layers import Layer, Network, Shape, assemble

Value = int | float | str | bool
Values = Mapping[str, Value]
Condition = tuple[str, tuple[Value, ...]]  # the name of an earlier choice, and the options of it that count
InputShape = Callable[[Values], Shape]

DEPLOYMENT_ROLES = ("precision", "patches", "patch_stages")  # how a network is run; they change no weight
RESTRICT = "restrict"  # the setting, of every family, that limits choices to some of their options
MOST_LISTED = 1_000_000  # architectures that `SearchSpace.all` agrees to list


class InvalidArchitecture(ValueError):
    """A text, code or mapping that names no architecture of the space."""


class NotScalable(ValueError):
    """A family that does not say how its spaces are made larger or smaller."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A decision: a name, its ordered options (smallest first) and the role it plays.

    `active_if` lists the conditions under which the choice changes anything: (name of an earlier choice,
    the options of it for which this one matters). An inactive choice is held at its first option.
    """

    name: str
    options: tuple[Value, ...]
    role: str
    active_if: tuple[Condition, ...] = ()

    def __post_init__(self) -> None:
        if not self.options:
            raise ValueError(f"choice {self.name!r} has no options")
        if len(set(self.options)) != len(self.options):
            raise ValueError(f"choice {self.name!r} repeats an option: {self.options}")

    def code_of(self, value: Value) -> int:
        for code, option in enumerate(self.options):
            if option == value and isinstance(option, bool) == isinstance(value, bool):
                return code
        raise InvalidArchitecture(f"{self.name} = {value!r} is not an option; options: {list(self.options)}")


@dataclass(frozen=True)
class Architecture:
    """One point of a space: immutable, hashable and canonical, so equal exactly when the network is the same.

    `codes` holds the option index of every choice, zero where the choice is inactive. `str` lists the
    first choice and what differs from the first options, and reads back through `SearchSpace.parse`.
    """

    space: str
    codes: tuple[int, ...]
    choices: tuple[Choice, ...] = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Value:
        return self.values[name]

    @cached_property
    def values(self) -> Values:
        pairs = zip(self.choices, self.codes, strict=True)
        return {choice.name: choice.options[code] for choice, code in pairs}

    @cached_property
    def id(self) -> str:
        """Ten hexadecimal digits that name the architecture in files and tables."""
        return hashlib.sha256(f"{self.space}:{self}".encode()).hexdigest()[:10]

    def __str__(self) -> str:
        pairs = zip(self.choices, self.codes, strict=True)
        told = [(choice, code) for i, (choice, code) in enumerate(pairs) if code or i == 0]
        return ",".join(f"{choice.name}={choice.options[code]}" for choice, code in told)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in the network: the choices it reads, and how their values become layers (none when absent)."""

    name: str
    reads: tuple[str, ...]
    build: Callable[[Values], tuple[Layer, ...]]

    def lower(self, values: Values) -> tuple[Layer, ...]:
        return _lowered(self, tuple([values[name] for name in self.reads]))


@lru_cache(maxsize=2**13)  # networks of one space share most of their slots
def _lowered(slot: Slot, values: tuple[Value, ...]) -> tuple[Layer, ...]:
    return slot.build(dict(zip(slot.reads, values, strict=True)))


class SearchSpace:
    """What can be built: choices, slots and everything derived from them.

    `family` and `settings` are what `search_spaces.build_space` needs to make the space again; of a restricted
    space the settings hold `restrict`: the options left of each choice that was limited.
    """

    def __init__(
        self,
        family: str,
        settings: Mapping[str, object],
        choices: Sequence[Choice],
        slots: Sequence[Slot],
        input_shape: InputShape,
        classes: int,
    ) -> None:
        self.family = family
        self.settings = dict(settings)
        self.choices = tuple(choices)
        self.slots = tuple(slots)
        self.classes = classes
        self._input_shape = input_shape
        self._index = {choice.name: i for i, choice in enumerate(self.choices)}
        if len(self._index) != len(self.choices):
            raise ValueError("two choices share a name")
        digest = hashlib.sha256(repr((sorted(self.settings.items()), self.choices)).encode())
        self.name = f"{family}-{digest.hexdigest()[:8]}"
        for i, choice in enumerate(self.choices):
            late = [name for name, _ in choice.active_if if self._index.get(name, i) >= i]
            if late:
                raise ValueError(f"choice {choice.name!r} depends on {late}, which must come before it")
        self._conditions = tuple(tuple(map(self._compiled, choice.active_if)) for choice in self.choices)
        for slot in self.slots:
            missing = [name for name in slot.reads if name not in self._index]
            if missing:
                raise ValueError(f"slot {slot.name!r} reads {missing}, which are not choices")

    def _compiled(self, condition: Condition) -> tuple[int, frozenset[int]]:
        """The index of the choice that is asked, and the codes of it that count."""
        name, options = condition
        choice = self.choice(name)
        return self._index[name], frozenset(choice.code_of(option) for option in options)

    def __repr__(self) -> str:
        return f"<SearchSpace {self.name}: {len(self.choices)} choices, {size_text(self.size)} architectures>"

    # architectures -------------------------------------------------------------------------------------

    def from_codes(self, codes: Iterable[int]) -> Architecture:
        """The canonical architecture of a code vector; raises InvalidArchitecture for a code out of range."""
        given = [index(code) for code in codes]
        if len(given) != len(self.choices):
            raise InvalidArchitecture(f"expected {len(self.choices)} codes, got {len(given)}")
        for choice, code in zip(self.choices, given, strict=True):
            if not 0 <= code < len(choice.options):
                raise InvalidArchitecture(f"{choice.name}: code {code} is not in 0..{len(choice.options) - 1}")
        canonical = tuple(code if active else 0 for code, active in zip(given, self._activity(given), strict=True))
        return Architecture(self.name, canonical, self.choices)

    def canonical_codes(self, codes: np.ndarray) -> np.ndarray:
        """The codes (n, d) of the canonical architectures of code vectors (n, d), int64: `from_codes` of each row.

        Raises InvalidArchitecture for another number of columns and for a code out of range.
        """
        codes = np.array(codes, dtype=np.int64)
        counts = np.array([len(choice.options) for choice in self.choices], dtype=np.int64)
        if codes.ndim != 2 or codes.shape[1] != len(counts):
            raise InvalidArchitecture(f"expected codes of shape (n, {len(counts)}), got {codes.shape}")
        wrong = np.argwhere((codes < 0) | (codes >= counts))
        if len(wrong):
            self.from_codes(codes[wrong[0, 0]])  # says which
        active = np.ones(codes.shape, dtype=bool)
        for i, conditions in enumerate(self._conditions):
            for parent, allowed in conditions:
                active[:, i] &= active[:, parent] & np.isin(codes[:, parent], list(allowed))
        return np.where(active, codes, 0)

    def _activity(self, codes: Sequence[int]) -> list[bool]:
        """Whether each choice changes the network; parents come before their children."""
        active: list[bool] = []
        for conditions in self._conditions:
            active.append(all(active[parent] and codes[parent] in allowed for parent, allowed in conditions))
        return active

    def _own(self, architecture: Architecture) -> Architecture:
        if architecture.space != self.name:
            raise InvalidArchitecture(f"an architecture of the space {architecture.space}, expected {self.name}")
        return architecture

    def is_active(self, name: str, architecture: Architecture) -> bool:
        """Whether the choice changes the network of `architecture`."""
        choice = self.choice(name)
        return self._activity(self._own(architecture).codes)[self._index[choice.name]]

    def choice(self, name: str) -> Choice:
        try:
            return self.choices[self._index[name]]
        except KeyError:
            near = difflib.get_close_matches(name, list(self._index), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidArchitecture(f"the space {self.family!r} has no choice {name!r}{hint}") from None

    def build(self, values: Values) -> Architecture:
        """The architecture with these values; choices left out take their first option."""
        codes = [0] * len(self.choices)
        for name, value in values.items():
            code = self.choice(name).code_of(value)
            codes[self._index[name]] = code
        return self.from_codes(codes)

    def parse(self, text: str) -> Architecture:
        """Read back what `str(architecture)` wrote; raises InvalidArchitecture saying what is wrong."""
        values: dict[str, Value] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, separator, raw = item.partition("=")
            if not separator:
                raise InvalidArchitecture(f"expected choice=value, got {item!r}")
            choice = self.choice(name.strip())
            matches = [option for option in choice.options if str(option) == raw.strip()]
            if not matches:
                raise InvalidArchitecture(
                    f"{choice.name} = {raw.strip()} is not an option; options: {', '.join(map(str, choice.options))}"
                )
            if choice.name in values:
                raise InvalidArchitecture(f"{choice.name} is given twice")
            values[choice.name] = matches[0]
        return self.build(values)

    def all(self) -> Iterator[Architecture]:
        """Every architecture once, in the order of their codes; raises ValueError above a million of them."""
        if self.size > MOST_LISTED:
            raise ValueError(
                f"the space {self.name} has {size_text(self.size)} architectures, too many to list "
                f"(at most {MOST_LISTED:,}): restrict it, or sample"
            )
        return self._listed()

    def _listed(self) -> Iterator[Architecture]:
        counts = [len(choice.options) for choice in self.choices]
        codes = [0] * len(counts)
        while True:
            yield self.from_codes(codes)
            active = self._activity(codes)
            last = max((i for i, count in enumerate(counts) if active[i] and codes[i] + 1 < count), default=None)
            if last is None:
                return
            codes[last:] = [codes[last] + 1, *[0] * (len(codes) - last - 1)]

    @property
    def smallest(self) -> Architecture:
        return self.from_codes([0] * len(self.choices))

    @property
    def largest(self) -> Architecture:
        """The last option of every choice, but run as `undeployed` says: the network all weights are cut from."""
        return self.undeployed(self.from_codes([len(choice.options) - 1 for choice in self.choices]))

    @cached_property
    def size(self) -> int:
        """Number of distinct architectures; exact, by counting over the parents of conditions."""
        return _count(self.choices)

    def sample(self, rng: np.random.Generator) -> Architecture:
        """Every choice uniform and independent, then canonical."""
        counts = [len(choice.options) for choice in self.choices]
        return self.from_codes([int(rng.integers(count)) if count > 1 else 0 for count in counts])

    def mutate(self, architecture: Architecture, rng: np.random.Generator, *, rate: float = 0.1) -> Architecture:
        """Redraw each choice with probability `rate`, at least one active one; differs from the parent if any can."""
        active = [i for i in self._active_indices(self._own(architecture).codes) if len(self.choices[i].options) > 1]
        if not active:
            return architecture
        codes = list(architecture.codes)
        forced = int(rng.choice(active))
        for i, choice in enumerate(self.choices):
            count = len(choice.options)
            if i == forced:
                codes[i] = (codes[i] + 1 + int(rng.integers(count - 1))) % count
            elif rng.random() < rate:
                codes[i] = int(rng.integers(count))
        return self.from_codes(codes)

    def crossover(self, a: Architecture, b: Architecture, rng: np.random.Generator) -> Architecture:
        """Each choice from one parent or the other, with equal probability."""
        from_a = rng.random(len(self.choices)) < 0.5
        return self.from_codes(np.where(from_a, self._own(a).codes, self._own(b).codes))

    def neighbours(self, architecture: Architecture) -> Iterator[Architecture]:
        """All architectures that differ in the option of one active choice."""
        for i in self._active_indices(self._own(architecture).codes):
            for code in range(len(self.choices[i].options)):
                if code != architecture.codes[i]:
                    yield self.from_codes([*architecture.codes[:i], code, *architecture.codes[i + 1 :]])

    def _active_indices(self, codes: Sequence[int]) -> list[int]:
        return [i for i, active in enumerate(self._activity(codes)) if active]

    def encode(self, architectures: Iterable[Architecture]) -> np.ndarray:
        """Option indices, int64, shape (n, number of choices)."""
        rows = [self._own(architecture).codes for architecture in architectures]
        return np.asarray(rows, dtype=np.int64).reshape(-1, len(self.choices))

    def one_hot(self, architectures: Iterable[Architecture]) -> np.ndarray:
        """One column an option, float64, shape (n, sum of option counts); an inactive choice has no one at all."""
        architectures = list(architectures)
        out = np.zeros((len(architectures), sum(len(choice.options) for choice in self.choices)))
        starts = np.cumsum([0, *(len(choice.options) for choice in self.choices)])
        for row, architecture in enumerate(architectures):
            for i in self._active_indices(self._own(architecture).codes):
                out[row, starts[i] + architecture.codes[i]] = 1.0
        return out

    # parts of the space --------------------------------------------------------------------------------

    def restricted(self, values: Mapping[str, Iterable[Value]]) -> Self:
        """The same networks, with the choices named limited to these options; their order stays.

        A choice that no option left can make active keeps its first option. Layer names stay, and so do the
        settings, with what is left of each choice under `restrict`, which `build_space` reads back; architectures
        are those of another space, so go over by `build(architecture.values)`.

        Raises InvalidArchitecture for an unknown choice or option, and where no option is left.
        """
        wanted = {self.choice(name).name: self._kept(name, options) for name, options in values.items()}
        left: dict[str, Choice] = {}
        never: set[str] = set()
        for choice in self.choices:
            options = wanted.get(choice.name, choice.options)
            conditions = tuple(
                (parent, _common(counting, left[parent].options)) for parent, counting in choice.active_if
            )
            if any(parent in never or not counting for parent, counting in conditions):
                never.add(choice.name)
                options = options[:1]
            left[choice.name] = Choice(choice.name, options, choice.role, conditions)
        limits = {name: list(kept) for name, kept in wanted.items() if len(kept) < len(self.choice(name).options)}
        limits = {**self.settings.get(RESTRICT, {}), **limits}  # type: ignore[dict-item]
        settings = {key: value for key, value in self.settings.items() if key != RESTRICT}
        if limits:
            settings[RESTRICT] = {name: limits[name] for name in left if name in limits}
        part = copy.copy(self)
        part.__dict__.pop("size", None)  # cached
        SearchSpace.__init__(
            part, self.family, settings, tuple(left.values()), self.slots, self._input_shape, self.classes
        )
        return part

    def only(self, architecture: Architecture) -> Self:
        """The space of that one architecture, which is its `smallest`."""
        values = self._own(architecture).values
        return self.restricted({name: [values[name]] for name in values if self.is_active(name, architecture)})

    @classmethod
    def placed(
        cls, settings: Mapping[str, object], *, resolution: int, width: float, precisions: Sequence[str]
    ) -> dict[str, object]:
        """The settings with one input side in pixels, all channels times `width` and these options of precision.

        Raises NotScalable unless the family says how, and ValueError for settings that have an input side already
        or `restrict`.
        """
        raise NotScalable(f"the family {cls.__name__} does not say how to set its input side and widths: no 'placed'")

    @classmethod
    def scaled(
        cls, settings: Mapping[str, object], *, resolution: float, depth: float, width: float
    ) -> dict[str, object]:
        """Complete settings with the input side, the number of blocks and the channels of the blocks multiplied.

        What a first and last layer have, and where the strides are, stays. Raises NotScalable unless the family
        says how, and ValueError for settings with `restrict`.
        """
        raise NotScalable(f"the family {cls.__name__} does not say how to scale its blocks: it has no method 'scaled'")

    def _kept(self, name: str, values: Iterable[Value]) -> tuple[Value, ...]:
        """The options of the choice that are among `values`, in their order."""
        choice = self.choice(name)
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise InvalidArchitecture(f"{name} = {values!r}: expected a list of options out of {list(choice.options)}")
        codes = {choice.code_of(value) for value in values}
        if not codes:
            raise InvalidArchitecture(f"{name}: no option is left; keep one of {list(choice.options)}")
        return tuple(choice.options[code] for code in sorted(codes))

    # networks ------------------------------------------------------------------------------------------

    def lower(self, architecture: Architecture) -> Network:
        """The network of an architecture: the layers of its slots, chained."""
        values = self._own(architecture).values
        slots = [slot.lower(values) for slot in self.slots]
        return assemble(self._input_shape(values), slots, name=architecture.id)

    def with_precision(self, architecture: Architecture, precision: str) -> Architecture:
        """The same network with every precision choice set to `precision` (where it is an option)."""
        codes = list(self._own(architecture).codes)
        for i, choice in enumerate(self.choices):
            if choice.role == "precision" and precision in choice.options:
                codes[i] = choice.code_of(precision)
        return self.from_codes(codes)

    def unpatched(self, architecture: Architecture) -> Architecture:
        """The same network with its first layers run whole, where the space has that: patches at the first option."""
        return self._reset(architecture, ("patches",))

    def undeployed(self, architecture: Architecture) -> Architecture:
        """The same weights with every choice of how they are run at its first option: what training sees."""
        return self._reset(architecture, DEPLOYMENT_ROLES)

    def _reset(self, architecture: Architecture, roles: Sequence[str]) -> Architecture:
        pairs = zip(self.choices, self._own(architecture).codes, strict=True)
        return self.from_codes(0 if choice.role in roles else code for choice, code in pairs)

    def occurrences(self) -> Iterator[Network]:
        """Networks that together show every layer at its largest: the largest, the smallest, and each variation
        of one choice of the largest. The conformance suite checks this promise for every family."""
        yield self.lower(self.largest)
        yield self.lower(self.smallest)
        for architecture in self.neighbours(self.largest):
            yield self.lower(architecture)


def size_text(size: int) -> str:
    """Three digits of a number of architectures, such as 1.23e+400: floats end at 1e308."""
    return f"{size:.3g}" if size < 1e300 else f"{Decimal(size):.2e}"


def _common(counting: tuple[Value, ...], options: tuple[Value, ...]) -> tuple[Value, ...]:
    return tuple(option for option in counting if option in options)


def _count(choices: Sequence[Choice]) -> int:
    """Count canonical code vectors without listing them.

    Choices that nothing depends on multiply, given their parents; the parents are few, so they are
    counted by recursion: assign one parent, split the rest into independent groups, multiply.
    """
    return _count_given(list(choices), {})


def _count_given(choices: list[Choice], fixed: dict[str, Value]) -> int:
    live: list[Choice] = []
    for choice in choices:
        known = [(name, options) for name, options in choice.active_if if name in fixed]
        if all(fixed[name] in options for name, options in known):
            rest = tuple(pair for pair in choice.active_if if pair[0] not in fixed)
            live.append(Choice(choice.name, choice.options, choice.role, rest))
        else:  # inactive: held at its first option, and so is everything that needs it active
            fixed = {**fixed, choice.name: None}  # type: ignore[dict-item]
    return prod(_count_group(group, fixed) for group in _groups(live))


def _count_group(group: list[Choice], fixed: dict[str, Value]) -> int:
    if len(group) == 1:
        return len(group[0].options)
    parents = {name for choice in group for name, _ in choice.active_if}
    root = next(choice for choice in group if choice.name in parents and not choice.active_if)
    rest = [choice for choice in group if choice is not root]
    return sum(_count_given(rest, {**fixed, root.name: option}) for option in root.options)


def _groups(choices: list[Choice]) -> list[list[Choice]]:
    """Connected components of the dependency graph, in order."""
    group_of: dict[str, list[Choice]] = {}
    for choice in choices:
        merged = [choice]
        for name, _ in choice.active_if:
            if name in group_of and group_of[name] is not merged:
                merged = group_of[name] + [c for c in merged if c not in group_of[name]]
                for member in merged:
                    group_of[member.name] = merged
        for member in merged:
            group_of[member.name] = merged
    unique: list[list[Choice]] = []
    for group in group_of.values():
        if not any(group is seen for seen in unique):
            unique.append(group)
    return unique
