"""Which architectures a training step trains, with which loss and weight: one small interface, one class a method.

A strategy is a pure function of (seed, step): it plans each step as data, and the trainer carries the plan out
without knowing any strategy by name.

    step -> Step(passes=(Pass(largest), Pass(smallest, teacher="largest"), ...), learning_rate=0.73, ...)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from search_spaces import Architecture, SearchSpace
from search_spaces.space import DEPLOYMENT_ROLES

LARGEST_SET = 160  # SortedNet trained up to 160 sub-models at once (arXiv 2309.00255)

SIZES = ("smallest", "middle", "largest")  # the architectures whose health is watched
FROZEN, LARGEST = "frozen", "largest"  # teachers
FREEZE_TEACHER, SORT_CHANNELS = "freeze_teacher", "sort_channels"  # events

MACS_GROUPS = 25  # of attentive sampling; ours: the source has bins of 25 million MACs (arXiv 2011.09011)
POOL = 1000  # draws that attentive sampling chooses from


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a step; its gradient is added to that of the others.

    candidates: the architecture; or several, of which the one with the lowest (or `highest`) loss now is trained.
    micro_batch: which of the step's micro-batches it sees.
    weight: of its gradient.
    teacher: none; `largest`, the logits of the step's pass over the largest network on the same images (in-place
        distillation, arXiv 1903.05134); or `frozen`, the largest network as it was at the event `freeze_teacher`.
    labels: weight of the loss on labels, added to the distillation loss, if there is a teacher.
    regularized: whether the pass is regularized (drop path); the small subnets of a sandwich underfit already.
    """

    candidates: tuple[Architecture, ...]
    micro_batch: int = 0
    weight: float = 1.0
    teacher: str = ""
    labels: float = 1.0
    highest: bool = False
    regularized: bool = True


@dataclass(frozen=True)
class Step:
    """What one optimizer step does.

    learning_rate: as a share of the peak.
    events: done once before the passes: `sort_channels` (most important first) or `freeze_teacher`.
    watched: which sizes the strategy trains by now, so that their accuracy says whether training is healthy.
    """

    passes: tuple[Pass, ...]
    learning_rate: float
    events: tuple[str, ...] = ()
    watched: tuple[str, ...] = SIZES


class Strategy(Protocol):
    """Plans the steps of a training; the trainer knows no strategy by name."""

    def step(self, number: int) -> Step:
        """The plan of step `number`: the same for the same step, always."""


@dataclass(frozen=True)
class StrategySettings:
    """What strategies can be told.

    strategy: one of `STRATEGIES`.
    architectures: size of the fixed set of `sorted`.
    micro_batches: batches a step, each with architectures of its own, whose gradients are accumulated.
    sampled: random architectures in each step of `sandwich`, `delayed` and `attentive`.
    warmup: share of all steps in which the learning rate rises linearly; then it follows a cosine to zero.
    delay: share of the steps in which `delayed` trains the largest network alone.
    ramp: share of the steps, before the end of the delay, in which its subnets' learning rate rises from zero.
    attend: whether `attentive` trains the `best` or the `worst` of its candidates.
    """

    strategy: str = "sorted"
    architectures: int = LARGEST_SET
    micro_batches: int = 1
    sampled: int = 2
    warmup: float = 0.05
    delay: float = 0.5
    ramp: float = 0.02
    attend: str = "best"

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise ValueError(f"train.strategy = {self.strategy!r}; expected one of {', '.join(STRATEGIES)}")
        if self.attend not in ("best", "worst"):
            raise ValueError(f"train.attend = {self.attend!r}; expected best or worst")
        self._check("architectures", 2 <= self.architectures <= LARGEST_SET, f"2 to {LARGEST_SET}")
        self._check("micro_batches", self.micro_batches > 0, "more than 0")
        self._check("sampled", self.sampled >= 0, "0 or more")
        self._check("warmup", 0 <= self.warmup <= 1, "a share of the steps, from 0 to 1")
        self._check("delay", 0 <= self.delay < 1, "a share of the steps, from 0 to below 1")
        if self.strategy == "delayed":
            self._check("ramp", 0 <= self.ramp <= self.delay, "a share of the steps, from 0 to train.delay")

    def _check(self, name: str, valid: bool, expected: str) -> None:
        if not valid:
            raise ValueError(f"train.{name} = {getattr(self, name)}; expected {expected}")


def cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the peak learning rate: a linear warm-up, then a cosine that ends at zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


# the methods ---------------------------------------------------------------------------------------------


class _Planner:
    """What all strategies hold: the space, and generators that depend on seed and step alone."""

    def __init__(self, space: SearchSpace, seed: int, steps: int, settings: StrategySettings) -> None:
        self.space, self.seed, self.steps, self.settings = space, seed, steps, settings

    def _rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, 2, step])

    def _rate(self, step: int) -> float:
        return cosine(step, self.steps, self.settings.warmup)

    def _over_micro_batches(self, plan: Callable[[int], Iterable[Pass]]) -> tuple[Pass, ...]:
        return tuple(one for part in range(self.settings.micro_batches) for one in plan(part))

    @property
    def _share(self) -> float:
        """Weight of a pass, so that micro-batches average."""
        return 1.0 / self.settings.micro_batches


class Sorted(_Planner):
    """SortedNet (arXiv 2309.00255): uniform draws from a fixed set of nested sub-models.

    The set is a chain that shrinks everything together, a chain that shrinks each role alone (width, depth,
    kernel, ...), and random architectures up to `settings.architectures`.
    """

    def __init__(self, space: SearchSpace, seed: int, steps: int, settings: StrategySettings) -> None:
        super().__init__(space, seed, steps, settings)
        self.set = nested_set(space, settings.architectures, np.random.default_rng([seed, 1]))

    def step(self, number: int) -> Step:
        drawn = self._rng(number).integers(len(self.set), size=self.settings.micro_batches)
        passes = tuple(Pass((self.set[int(i)],), part, self._share) for part, i in enumerate(drawn))
        return Step(passes, self._rate(number))


class Uniform(_Planner):
    """Single path one-shot (arXiv 1904.00420): each choice of each micro-batch uniform and independent."""

    def step(self, number: int) -> Step:
        rng = self._rng(number)
        parts = range(self.settings.micro_batches)
        passes = tuple(Pass((sample(self.space, rng),), part, self._share) for part in parts)
        return Step(passes, self._rate(number))


class Sandwich(_Planner):
    """BigNAS (arXiv 2003.11142): the largest on labels; the smallest and random ones on the largest's logits."""

    def step(self, number: int) -> Step:
        rng = self._rng(number)
        return Step(self._over_micro_batches(lambda part: self._passes(part, rng, 1.0)), self._rate(number))

    def _passes(self, part: int, rng: np.random.Generator, subnets: float) -> list[Pass]:
        """The sandwich of one micro-batch; `subnets` is the weight of all but the largest."""
        weight = subnets * self._share
        taught = [self._taught((self.space.smallest,), part, weight)]
        taught += [self._random(part, rng, weight) for _ in range(self.settings.sampled)]
        return [Pass((self.space.largest,), part, self._share), *taught]

    def _random(self, part: int, rng: np.random.Generator, weight: float) -> Pass:
        return self._taught((sample(self.space, rng),), part, weight)

    def _taught(self, candidates: tuple[Architecture, ...], part: int, weight: float) -> Pass:
        highest = self.settings.attend == "worst"
        return Pass(candidates, part, weight, LARGEST, labels=0.0, highest=highest, regularized=False)


class Attentive(Sandwich):
    """AttentiveNAS (arXiv 2011.09011): a sandwich whose random networks are the best, or worst, of three.

    The three are distinct and have about the same MACs: what `POOL` draws from the space gave is sorted by MACs and
    split into groups of one size, a group is drawn, then three of it. Which of them has the lowest, or highest, loss
    on the batch decides the trainer. Networks that were not drawn are trained through shared weights only.
    """

    CANDIDATES = 3

    def __init__(self, space: SearchSpace, seed: int, steps: int, settings: StrategySettings) -> None:
        super().__init__(space, seed, steps, settings)
        rng = np.random.default_rng([seed, 1])
        pool = dict.fromkeys(sample(space, rng) for _ in range(POOL))
        ranked = sorted(pool, key=lambda architecture: space.lower(architecture).macs)
        count = max(1, min(MACS_GROUPS, len(ranked) // self.CANDIDATES))
        ends = np.linspace(0, len(ranked), count + 1).round().astype(int)
        self.groups = tuple(tuple(ranked[a:b]) for a, b in pairwise(ends))

    def _random(self, part: int, rng: np.random.Generator, weight: float) -> Pass:
        group = self.groups[int(rng.integers(len(self.groups)))]
        drawn = rng.choice(len(group), size=min(self.CANDIDATES, len(group)), replace=False)
        return self._taught(tuple(group[int(i)] for i in drawn), part, weight)


class Delayed(Sandwich):
    """DepS (arXiv 2407.06167): the largest alone to about half of the training, then a sandwich.

    When the subnets join, channels are sorted, and the subnets' learning rate rises from zero to the one of that
    time over the ramp, while the largest keeps its own. They never see labels.
    """

    def __init__(self, space: SearchSpace, seed: int, steps: int, settings: StrategySettings) -> None:
        super().__init__(space, seed, steps, settings)
        self.end = round(settings.delay * steps)  # of the delay and of the ramp
        self.start = round((settings.delay - settings.ramp) * steps)

    def step(self, number: int) -> Step:
        rate = self._rate(number)
        if number < self.start:
            alone = self._over_micro_batches(lambda part: [Pass((self.space.largest,), part, self._share)])
            return Step(alone, rate, watched=("largest",))
        rng, subnets = self._rng(number), self._subnet_weight(number)
        passes = self._over_micro_batches(lambda part: self._passes(part, rng, subnets))
        return Step(passes, rate, events=(SORT_CHANNELS,) if number == self.start else ())

    def _subnet_weight(self, step: int) -> float:
        """The ramp; a weight on the gradient does to the subnets what a learning rate of their own would do."""
        if step >= self.end:
            return 1.0
        risen = (step - self.start) / max(1, self.end - self.start)
        return risen * self._rate(self.end) / max(self._rate(step), 1e-12)


@dataclass(frozen=True)
class _Phase:
    """A part of progressive shrinking: which roles are elastic, how many options of each, and how it is trained."""

    share: float  # of all steps
    roles: tuple[str, ...]  # elastic ones
    newest: tuple[str, ...]  # of those, the ones of which only the two largest options count yet
    subnets: int
    rate: float  # peak learning rate, as a share of that of the first phase


class Progressive(_Planner):
    """Once-for-all (arXiv 1908.09791): the largest network first, then kernel, depth and width become elastic.

    The trained largest network is kept as the teacher of all later phases, whose loss is distillation plus
    labels. Channels are sorted before width becomes elastic. Phases take the shares of the training that the
    authors' 605 epochs give them; those of roles that are not elastic in the space are left out.
    """

    # epochs, learning rates and subnets a step of github.com/mit-han-lab/once-for-all, as in its training scripts
    FIRST = _Phase(180, (), (), 1, 1.0)
    GROUPS: tuple[tuple[frozenset[str], int, int, int], ...] = (  # roles, epochs of two options, of all, subnets
        (frozenset({"resolution", "kernel"}), 0, 125, 1),
        (frozenset({"depth"}), 25, 125, 2),
        (frozenset(), 25, 125, 4),  # every other role
    )
    RATE, RATE_OF_TWO = 0.25, 0.083  # .0075 and .0025, against .03

    def __init__(self, space: SearchSpace, seed: int, steps: int, settings: StrategySettings) -> None:
        super().__init__(space, seed, steps, settings)
        phases = self._phases()
        total = sum(phase.share for phase in phases)
        ends = [round(end) for end in np.cumsum([phase.share for phase in phases]) / total * steps]
        spans = zip(phases, (0, *ends[:-1]), ends, strict=True)
        self.phases = tuple(span for span in spans if span[1] < span[2])  # few steps leave none for a short phase
        widths = {"width", "expand", "heads"}.intersection(phases[-1].roles)
        self._widths = widths or {"depth"}  # a space that ties width to depth has no role of it (arXiv 2104.12642)

    def _phases(self) -> list[_Phase]:
        options: dict[str, int] = {}
        for choice in self.space.choices:
            if choice.role not in DEPLOYMENT_ROLES:
                options[choice.role] = max(options.get(choice.role, 0), len(choice.options))
        elastic = [role for role, count in options.items() if count > 1]
        named = frozenset[str]().union(*(group for group, *_ in self.GROUPS))
        phases, opened = [self.FIRST], tuple[str, ...]()
        for group, epochs_of_two, epochs, subnets in self.GROUPS:
            new = tuple(role for role in elastic if (role in group if group else role not in named))
            if not new:
                continue
            if epochs_of_two and any(options[role] > 2 for role in new):
                phases.append(_Phase(epochs_of_two, (*opened, *new), new, subnets, self.RATE_OF_TWO))
            opened += new
            phases.append(_Phase(epochs, opened, (), subnets, self.RATE if epochs_of_two else 1.0))
        last = phases[-1]  # everything is elastic in it: as many subnets as the authors' last phase
        phases[-1] = _Phase(last.share, last.roles, last.newest, self.GROUPS[-1][3], last.rate) if opened else last
        return phases

    def step(self, number: int) -> Step:
        phase, start, end = next(found for found in reversed(self.phases) if number >= found[1])
        rate = phase.rate * cosine(number - start, end - start, self.settings.warmup)
        watched = SIZES if phase is self.phases[-1][0] else (LARGEST,)
        if not phase.roles:
            alone = self._over_micro_batches(lambda part: [Pass((self.space.largest,), part, self._share)])
            return Step(alone, rate, watched=watched)
        rng = self._rng(number)

        def taught(part: int) -> list[Pass]:
            drawn = [(self._sample(phase, rng),) for _ in range(phase.subnets)]
            return [Pass(one, part, self._share, FROZEN, regularized=False) for one in drawn]

        events = self._events(phase) if number == start else ()
        return Step(self._over_micro_batches(taught), rate, events, watched)

    def _events(self, phase: _Phase) -> tuple[str, ...]:
        """The teacher is kept after the first phase; channels are sorted when widths become elastic."""
        order = [held for held, *_ in self.phases]
        index = order.index(phase)
        before = order[index - 1].roles if index else ()
        freezes = () if before else (FREEZE_TEACHER,)
        sorts = self._widths.intersection(phase.roles) and not self._widths.intersection(before)
        return (*freezes, *((SORT_CHANNELS,) if sorts else ()))

    def _sample(self, phase: _Phase, rng: np.random.Generator) -> Architecture:
        codes = []
        for choice in self.space.choices:
            last = len(choice.options) - 1
            if choice.role in DEPLOYMENT_ROLES:
                codes.append(0)
            elif choice.role in phase.roles:
                lowest = max(0, last - 1) if choice.role in phase.newest else 0
                codes.append(int(rng.integers(lowest, last + 1)))
            else:
                codes.append(last)
        return self.space.from_codes(codes)


STRATEGIES: Mapping[str, Callable[[SearchSpace, int, int, StrategySettings], Strategy]] = {
    "sorted": Sorted,
    "sandwich": Sandwich,
    "progressive": Progressive,
    "delayed": Delayed,
    "uniform": Uniform,
    "attentive": Attentive,
}


# architectures -------------------------------------------------------------------------------------------


def sample(space: SearchSpace, rng: np.random.Generator) -> Architecture:
    """Every choice uniform and independent; what changes no weight, such as a precision, stays at the first option."""
    return space.undeployed(space.sample(rng))


def middle(space: SearchSpace) -> Architecture:
    """Every choice at its middle option, the lower of two."""
    return space.from_codes(0 if c.role in DEPLOYMENT_ROLES else (len(c.options) - 1) // 2 for c in space.choices)


def nested_set(space: SearchSpace, size: int, rng: np.random.Generator) -> tuple[Architecture, ...]:
    """Up to `size` distinct architectures: the chains first, then random ones; fewer in a smaller space."""
    found = dict.fromkeys([space.largest, space.smallest])
    roles = [role for role in dict.fromkeys(c.role for c in space.choices) if role not in DEPLOYMENT_ROLES]
    for shrinking in [roles, *([role] for role in roles)]:
        found |= dict.fromkeys(_chain(space, shrinking))
    stale = 0
    while len(found) < size and stale < 200:
        fresh = sample(space, rng)
        stale = stale + 1 if fresh in found else 0
        found[fresh] = None
    return tuple(found)[:size]


def _chain(space: SearchSpace, roles: Sequence[str]) -> list[Architecture]:
    """From the largest down: every choice of these roles at the same fraction of its options."""
    steps = max((len(c.options) for c in space.choices if c.role in roles), default=1)
    chain = []
    for step in range(steps):
        codes = list(space.largest.codes)
        for i, choice in enumerate(space.choices):
            if choice.role in roles:
                codes[i] = round((len(choice.options) - 1) * (1 - step / max(1, steps - 1)))
        chain.append(space.from_codes(codes))
    return chain
