"""What limits leave to be searched, known before anything is evaluated.

The range that each limited figure can reach, over all legal architectures, and an architecture that meets all limits;
where there is none, the limits that cannot be met together.

    sums over slots     (MACs, bytes, additive latencies, energy) least and most by dynamic programming: exact
    largest of slots    (SRAM, for most planners) likewise; a limit takes out the rows of slots that are beyond it
    shares of MACs      a ratio of sums, by Dinkelbach's iteration (1967), each step a dynamic programme: exact
    anything else       (TensorFlow Lite Micro's arena, what runs in patches, latencies that are no sum) a lower bound
                        by the above, and the best that a descent over codes finds: exact where the two meet

Several limits on sums at once: Lagrange multipliers prove most sets impossible, or find an architecture on the way.
What they leave open is decided by listing partial architectures slot by slot, without those that are worse in every
limited sum or that cannot end within the limits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nas.costs import Infeasible, Limit
from nas.figure_table import Estimates
from nas.slot_program import RowCosts, program_of
from search_spaces import Architecture

if TYPE_CHECKING:
    from nas.candidates import Costs

RANDOM = 4_000  # architectures, of which the share that meets a limit is told
RANDOM_LOWERED = 200  # where each has to be lowered
STARTS = 3  # from which a descent goes down
STARTS_LOWERED = 2  # where each neighbour has to be lowered
MOST_STEPS = 200  # of a descent
MOST_STEPS_LOWERED = 6
MULTIPLIER_STEPS = 60
MOST_LABELS = 2_000  # partial architectures kept at once; beyond that nothing is proven
MOST_PEAKS = 64  # peaks of memory, from the smallest, at which the least of the rest is looked for
ROUNDING = 1e-10  # of a limit: sums of floats in two orders differ by less
Score = Callable[[np.ndarray, float], np.ndarray]  # codes (n, d) -> (n,); bounds will do above the second argument


@dataclass(frozen=True)
class Range:
    """What a limited figure can reach over the legal architectures, at the end of its interval where the limit has a
    confidence. None where only running an architecture, or a simulator, tells. An end that is not exact is the best
    that was found."""

    limit: Limit
    least: float | None
    most: float | None
    least_is_exact: bool
    most_is_exact: bool
    share: float | None
    sampled: int

    @property
    def always_met(self) -> bool:
        """Whether no legal architecture is beyond the limit."""
        upper = self.limit.operator == "<="
        worst, exact = (self.most, self.most_is_exact) if upper else (self.least, self.least_is_exact)
        return exact and worst is not None and not self._beyond(worst)

    @property
    def never_met(self) -> bool:
        """Whether the best value found is beyond the limit."""
        best = self.least if self.limit.operator == "<=" else self.most
        return best is not None and self._beyond(best)

    @property
    def best_is_exact(self) -> bool:
        return self.least_is_exact if self.limit.operator == "<=" else self.most_is_exact

    def _beyond(self, value: float) -> bool:
        return value > self.limit.value if self.limit.operator == "<=" else value < self.limit.value

    def __str__(self) -> str:
        if self.least is None or self.most is None:
            return f"{_spaced(self.limit)}: judged during the search; it is not known before"
        told = f"{_spaced(self.limit)}: reachable {self.reach}"
        if self.share is None:
            return told
        return f"{told}; {_percent(self.share)} of {self.sampled:,} random architectures meet it"

    @property
    def reach(self) -> str:
        assert self.least is not None
        assert self.most is not None
        least = _number(self.least) + ("" if self.least_is_exact else " (the least found)")
        most = _number(self.most) + ("" if self.most_is_exact else " (the most found)")
        return f"from {least} to {most}"


@dataclass(frozen=True)
class Reachable:
    """The range of each limit, and an architecture that meets all that can be judged before it is run."""

    ranges: tuple[Range, ...]
    architecture: Architecture


def reachable(costs: Costs, seed: int = 0) -> Reachable:
    """Judge the limits of `costs` before anything is evaluated.

    Raises Infeasible where they cannot be met, or where no architecture that meets them was found: it names the limits
    that bind (without any one of them the others can be met), what each reaches alone, and the nearest point.
    """
    judge = _Judge(costs, seed)
    judge.check_legal()
    ranges = tuple(judge.range_of(limit) for limit in costs.limits)
    judged = [each.limit for each in ranges if each.least is not None]
    answer = judge.solve(judged)
    if answer.codes is None:
        raise Infeasible(judge.refusal(ranges, answer))
    architecture = costs.space.from_codes(answer.codes)
    costs.figures(costs.space.lower(architecture))  # a simulator that is not installed is better missed now
    return Reachable(ranges, architecture)


@dataclass(frozen=True, eq=False)
class _Answer:
    """Codes that meet limits, or None; whether that is proven; and the codes that come nearest."""

    codes: np.ndarray | None
    proven: bool
    nearest: np.ndarray


@dataclass(frozen=True, eq=False)
class _Sum:
    """A limit as: the sum of the rows' costs is at most `bound`; all in shares of the limit."""

    costs: list[np.ndarray]
    bound: float


class _Judge:
    def __init__(self, costs: Costs, seed: int) -> None:
        self.costs, self.space, self.table = costs, costs.space, costs.table
        codes = {c.name: [c.code_of(o) for o in costs.options[c.name]] for c in self.space.choices}
        self.legal = [codes[choice.name] for choice in self.space.choices]
        self.program, self.is_whole = program_of(self.table.table, codes)
        self.slots = self.program.slots if self.program else []
        self.patched = self.table.has_patches and any((slot.costs[:, -1] > 0).any() for slot in self.slots)
        extremes = [costs.legalize(each) for each in costs.extremes()]
        self.extremes = self.space.encode(dict.fromkeys(extremes))
        self.extremes_of: dict[tuple[object, ...], tuple[float, bool, float, bool]] = {}
        rng = np.random.default_rng([seed, 6])
        self.random = np.stack([rng.choice(each, RANDOM) for each in self.legal], axis=1)

    def check_legal(self) -> None:
        """Raise Infeasible where no architecture has finite figures on all devices; says why."""
        if self.slots or self.program is None:
            return
        network = self.space.lower(self.costs.extremes()[0])
        why = next(filter(None, (device.refusal(network) for device in self.costs.devices.values())), "")
        found = "no architecture runs" if self.is_whole else "no architecture found runs"
        raise Infeasible(f"{found} on all devices: {why}; change the space or the devices")

    # ranges --------------------------------------------------------------------------------------------

    def range_of(self, limit: Limit) -> Range:
        if limit.name == "accuracy" or (limit.name == "latency_ms" and self.table.is_simulated(str(limit.device))):
            return Range(limit, None, None, False, False, None, 0)
        key = (limit.key, limit.operator, limit.confidence)
        if key not in self.extremes_of:
            self.extremes_of[key] = (*self._extreme(limit, 1.0), *self._extreme(limit, -1.0))
        least, least_is_exact, most, most_is_exact = self.extremes_of[key]
        codes = self.random[: RANDOM_LOWERED if self._is_lowered(limit) else RANDOM]
        share = float((self.table.violation(codes, [limit], most=0.0) <= 0).mean())
        return Range(limit, least, most, least_is_exact, most_is_exact, share, len(codes))

    def _is_lowered(self, limit: Limit) -> bool:
        """Whether there is only a bound of the figure for some architectures."""
        by_patches = self.patched and limit.device is not None and limit.name != "flash_bytes"
        return by_patches or self.table.is_lowered(limit.key)

    def _extreme(self, limit: Limit, sign: float) -> tuple[float, bool]:
        """The least (sign 1) or most (-1) of a limit's figure, and whether it is exact."""
        exact = self.is_whole and not self._is_lowered(limit)
        if self.program is not None and limit.name == "int8_macs_share":
            return self._value(limit, self._extreme_share(sign)), exact
        line = self.table.linear(limit.key)
        if self.program is not None and line is not None:
            costs = [sign * slot.costs @ self._weights(line.weights) for slot in self.slots]
            codes = self.program.codes(self.program.least(costs)[1])
            if exact or (sign > 0 and self.is_whole and self._is_bound(limit, codes, sign)):
                return self._value(limit, codes), True
            return self._searched(limit, sign, [codes])[0], False
        if self.program is not None and limit.name == "sram_bytes":
            starts, bound = self._sram_starts(limit, sign)
            if exact or (sign > 0 and self.is_whole and self._value(limit, starts[0]) <= bound):
                return self._value(limit, starts[0]), True
            value, _ = self._searched(limit, sign, starts)
            return value, sign > 0 and self.is_whole and value <= bound
        return self._searched(limit, sign, [])[0], False

    def _is_bound(self, limit: Limit, codes: np.ndarray, sign: float) -> bool:
        """Whether the figure of an architecture is no more than the bound that it is best by."""
        found, _ = self.table.bounds(codes[None])
        return bool(sign * self._value(limit, codes) <= sign * found[limit.key].judged_by(limit)[0])

    def _extreme_share(self, sign: float) -> np.ndarray:
        assert self.program is not None
        share, codes = 0.5, None
        while True:
            weights = self._weights({1: sign, 0: -sign * share})
            found = self.program.codes(self.program.least([slot.costs @ weights for slot in self.slots])[1])
            reached = self.table.figures(found[None])["int8_macs_share"].value[0]
            if codes is not None and sign * reached >= sign * share:
                return codes
            share, codes = reached, found

    def _sram_starts(self, limit: Limit, sign: float) -> tuple[list[np.ndarray], float]:
        """Architectures of little (sign 1) or much SRAM, the best first, and a lower bound of the least."""
        assert self.program is not None
        peak, kept = self.table.peak_and_kept(limit.key)
        peaks, rest = [slot.costs[:, peak] for slot in self.slots], [slot.costs[:, kept] for slot in self.slots]
        if sign < 0:
            place = int(np.argmax([each.max() for each in peaks]))
            chosen = [np.zeros(len(each)) for each in peaks]
            chosen[place][int(np.argmax(peaks[place]))] = -1.0
            ways = [chosen, [-each for each in rest]]
            return [self.program.codes(self.program.least(way)[1]) for way in ways], -math.inf
        if self.patched:
            return self._patched_starts(peaks)
        lowest, _ = self.program.least(peaks, largest=True)
        thresholds = [each for each in np.unique(np.concatenate(peaks)) if each >= lowest][:MOST_PEAKS]
        found: list[tuple[float, np.ndarray]] = []
        for threshold in thresholds if any(each.any() for each in rest) else [lowest]:
            costs = [np.where(p <= threshold, r, np.inf) for p, r in zip(peaks, rest, strict=True)]
            least, rows = self.program.least(costs)
            least += float(self.table.sram_bytes(str(limit.device), np.asarray(threshold)))
            found.append((least, self.program.codes(rows)))
        found.sort(key=lambda each: each[0])
        return [codes for _, codes in found[:STARTS]], found[0][0]

    def _patched_starts(self, peaks: RowCosts) -> tuple[list[np.ndarray], float]:
        """For each way to run in patches, whose own memory is not known: the least MACs and bytes, as shares of the
        most of a slot, at the least peak of the rest."""
        assert self.program is not None
        ways = [i for i, choice in enumerate(self.space.choices) if choice.role in ("patches", "patch_stages")]
        starts: list[np.ndarray] = []
        sizes = [slot.costs[:, [0, 3]] for slot in self.slots]
        largest = np.max([each.max(axis=0) for each in sizes], axis=0)
        for way in itertools.product(*(self.legal[i] for i in ways)):
            out = []
            for slot in self.slots:
                odd = [slot.codes[:, i] != code for i, code in zip(ways, way, strict=True) if i in slot.reads]
                out.append(np.where(np.logical_or.reduce([np.zeros(len(slot.origin), bool), *odd]), np.inf, 0.0))
            lowest, _ = self.program.least([p + o for p, o in zip(peaks, out, strict=True)], largest=True)
            costs = [
                np.where(p + o <= lowest, (size / largest).sum(axis=1), np.inf)
                for size, p, o in zip(sizes, peaks, out, strict=True)
            ]
            least, rows = self.program.least(costs)
            if math.isfinite(lowest) and math.isfinite(least):
                starts.append(self.program.codes(rows))
        return starts, -math.inf

    def _searched(self, limit: Limit, sign: float, starts: Sequence[np.ndarray]) -> tuple[float, np.ndarray]:
        """The least or most of a figure that a descent finds."""

        def score(codes: np.ndarray, most: float) -> np.ndarray:
            found, _ = self.table.bounds(codes, [limit.key])
            values = sign * found[limit.key].judged_by(limit)
            rows = values <= most if sign > 0 else np.ones(len(codes), bool)
            if rows.any():
                found = self.table.figures(codes[rows], [limit.key])
                values[rows] = sign * found[limit.key].judged_by(limit)
            return values

        codes = self._descended(score, starts, self._is_lowered(limit), -math.inf)
        return self._value(limit, codes), codes

    def _value(self, limit: Limit, codes: np.ndarray) -> float:
        return float(self.table.figures(codes[None], [limit.key])[limit.key].judged_by(limit)[0])

    def _weights(self, weights: Mapping[int, float]) -> np.ndarray:
        out = np.zeros(self.slots[0].costs.shape[1])
        for column, weight in weights.items():
            out[column] = weight
        return out

    # several limits ------------------------------------------------------------------------------------

    def solve(self, limits: Sequence[Limit]) -> _Answer:
        """An architecture within limits, or a proof that there is none, or what comes nearest."""

        def beyond(codes: np.ndarray, most: float) -> np.ndarray:
            return self.table.violation(codes, limits, most=most)

        tried = list(self.extremes)
        if beyond(self.extremes, 0.0).min() <= 0:
            impossible = False
        else:
            impossible = self.program is not None and self._by_sums(limits, tried)
        codes = np.stack(tried)
        met = np.flatnonzero(beyond(codes, 0.0) <= 0)
        if len(met):
            return _Answer(codes[met[0]], True, codes[met[0]])
        nearest = self._descended(beyond, tried, any(map(self._is_lowered, limits)), 0.0)
        if not impossible and beyond(nearest[None], 0.0)[0] <= 0:
            return _Answer(nearest, True, nearest)
        return _Answer(None, impossible and self.is_whole, nearest)

    def _by_sums(self, limits: Sequence[Limit], tried: list[np.ndarray]) -> bool:
        """Whether limits are impossible by their sums and peaks, exact or bounds; `tried` gets architectures."""
        assert self.program is not None
        kept = [np.ones(len(slot.origin), bool) for slot in self.slots]
        sums: list[_Sum] = []
        for limit in limits:
            if limit.name == "sram_bytes" and limit.operator == "<=":
                peak, _ = self.table.peak_and_kept(limit.key)
                tried += self._sram_starts(limit, 1.0)[0] if self.patched else []
                for keep, slot in zip(kept, self.slots, strict=True):
                    keep &= self.table.sram_bytes(str(limit.device), slot.costs[:, peak]) <= limit.value
            elif (made := self._sum_of(limit)) is not None:
                sums.append(made)
        out = [np.where(keep, 0.0, np.inf) for keep in kept]
        least, rows = self.program.least(out)
        if math.isinf(least):
            tried += [self._sram_starts(limit, 1.0)[0][0] for limit in limits if limit.name == "sram_bytes"]
            return True
        if not sums:
            tried.append(self.program.codes(rows))
            return False
        multipliers, impossible = self._multiplied(sums, out, tried)
        return self._listed(sums, out, multipliers, tried) if impossible is None else impossible

    def _sum_of(self, limit: Limit) -> _Sum | None:
        """A limit on a sum, which is exact or, of what runs in patches, a bound; None where it is neither."""
        sign = 1.0 if limit.operator == "<=" else -1.0
        scale = abs(limit.value) or 1.0
        if limit.name == "int8_macs_share":
            weights = self._weights({1: sign, 0: -sign * limit.value})
            scale = max(float(slot.costs[:, 0].max()) for slot in self.slots) or 1.0
            return _Sum([slot.costs @ weights / scale for slot in self.slots], 0.0)
        line = self.table.linear(limit.key)
        if line is None or (sign < 0 and self._is_lowered(limit)):
            return None
        line = line.times(self.table.end(limit))
        weights = self._weights(line.weights) * sign / scale
        return _Sum([slot.costs @ weights for slot in self.slots], sign * (limit.value - line.constant) / scale)

    def _multiplied(
        self, sums: Sequence[_Sum], out: RowCosts, tried: list[np.ndarray]
    ) -> tuple[np.ndarray, bool | None]:
        """(multipliers, whether they prove that no path meets all sums), by projected subgradient steps.

        None where that stays open; False where a path that is put in `tried` meets them.
        """
        assert self.program is not None
        bounds = np.array([each.bound for each in sums])
        multipliers = best = np.full(len(sums), 1 / len(sums))
        highest = -math.inf
        for step in range(MULTIPLIER_STEPS if len(sums) > 1 else 1):
            least, rows = self.program.least(_weighted(sums, multipliers, out))
            beyond = np.array([sum(c[r] for c, r in zip(s.costs, rows, strict=True)) for s in sums]) - bounds
            tried.append(self.program.codes(rows))
            dual = least - float(multipliers @ bounds)
            if dual > highest:
                highest, best = dual, multipliers
            if dual > ROUNDING:
                return best, True
            if (beyond <= 0).all():
                return best, False
            length = float(np.linalg.norm(beyond - beyond.mean())) or 1.0
            multipliers = _on_simplex(multipliers + 0.5 / math.sqrt(step + 1) * beyond / length)
        return best, None

    def _listed(self, sums: Sequence[_Sum], out: RowCosts, multipliers: np.ndarray, tried: list[np.ndarray]) -> bool:
        """Whether no path meets all sums, by listing partial paths; `tried` gets one that does.

        A partial path is dropped where another at the same state is no worse in any sum, or where no way to the end
        is within a sum or within their weighted total.
        """
        assert self.program is not None
        bounds = np.array([each.bound for each in sums])
        bounds = np.append(bounds, multipliers @ bounds) + ROUNDING
        every = [_weighted([each], np.ones(1), out) for each in sums] + [_weighted(sums, multipliers, out)]
        togo = [self.program.least_togo(each) for each in every]
        state, reached = np.zeros(1, np.int64), np.zeros((1, len(every)))
        back: list[tuple[np.ndarray, np.ndarray]] = []
        proven = True
        for place, slot in enumerate(self.slots):
            ends = np.append(slot.starts[1:], len(slot.origin))
            counts = ends[state] - slot.starts[state]
            label = np.repeat(np.arange(len(state)), counts)
            row = np.arange(len(label)) - np.repeat(np.cumsum(counts) - counts, counts) + slot.starts[state][label]
            now = reached[label] + np.stack([each[place] for each in every], axis=1)[row]
            left = now + np.stack([each[place + 1] for each in togo], axis=1)[slot.target[row]]
            fits = np.flatnonzero((left <= bounds).all(axis=1))
            fits = fits[np.argsort(left[fits, -1], kind="stable")]
            whole = len(fits)
            fits = fits[_not_worse(slot.target[row[fits[: 4 * MOST_LABELS]]], now[fits[: 4 * MOST_LABELS]])]
            proven &= whole <= 4 * MOST_LABELS and len(fits) <= MOST_LABELS
            fits = fits[:MOST_LABELS]
            if not len(fits):
                return proven
            state, reached = slot.target[row[fits]], now[fits]
            back.append((label[fits], row[fits]))
        at = int(np.argmin((reached - bounds)[:, :-1].max(axis=1)))
        rows: list[int] = []
        for labels, taken in reversed(back):
            rows.insert(0, int(taken[at]))
            at = int(labels[at])
        tried.append(self.program.codes(rows))
        return False

    # descents ------------------------------------------------------------------------------------------

    def _descended(self, score: Score, starts: Sequence[np.ndarray], lowered: bool, enough: float) -> np.ndarray:
        """The codes of least score that changes of one choice lead to, from `starts`, the extremes and random codes."""
        some = self.random[: 16 if lowered else 256]
        codes = np.concatenate([np.array(starts, np.int64).reshape(-1, len(self.legal)), self.extremes, some])
        scores = score(codes, math.inf)
        ends = [
            self._down(codes[i], float(scores[i]), score, MOST_STEPS_LOWERED if lowered else MOST_STEPS, enough)
            for i in np.argsort(scores, kind="stable")[: STARTS_LOWERED if lowered else STARTS]
        ]
        return min(ends, key=lambda each: each[0])[1]

    def _down(
        self, codes: np.ndarray, least: float, score: Score, steps: int, enough: float
    ) -> tuple[float, np.ndarray]:
        for _ in range(steps):
            if least <= enough:
                break
            near = {self.costs.legalize(each): None for each in self.space.neighbours(self.space.from_codes(codes))}
            around = self.space.encode(near)
            scores = score(around, least) if len(around) else np.zeros(0)
            if not len(scores) or not scores.min() < least:
                break
            least, codes = float(scores.min()), around[int(scores.argmin())]
        return least, codes

    # refusals ------------------------------------------------------------------------------------------

    def refusal(self, ranges: Sequence[Range], answer: _Answer) -> str:
        """Which limits bind, what each can reach, and the nearest point."""
        alone = [each for each in ranges if each.never_met]
        binding = [each.limit for each in alone] or self._irreducible(ranges)
        within = "; ".join(_reach(each) for each in ranges if each.limit in binding)
        if alone:
            nearest, reach = self.solve(binding).nearest, f" ({within})"
            proven = any(each.best_is_exact for each in alone)
        else:
            nearest, reach = answer.nearest, f" together, though each alone can be met ({within})"
            proven = answer.proven
        judged = [each.limit for each in ranges if each.least is not None]
        found = self.table.figures(nearest[None], [limit.key for limit in judged])
        values = dict.fromkeys(_reached(limit, found[limit.key]) for limit in judged)
        architecture = self.space.from_codes(nearest)
        return (
            f"no architecture {'' if proven else 'found '}meets {', '.join(map(str, self.costs.limits))}; "
            f"what binds is {', '.join(map(str, binding))}{reach}.\n"
            f"The nearest reachable point is {architecture.id}: {', '.join(values)}\n"
            f"It is {architecture}"
        )

    def _irreducible(self, ranges: Sequence[Range]) -> list[Limit]:
        """Limits that cannot be met together, of which any one less can: each is left out where the rest suffices."""
        kept = [each.limit for each in ranges if each.least is not None and not each.always_met]
        for limit in list(kept):
            fewer = [each for each in kept if each is not limit]
            if fewer and self.solve(fewer).codes is None:
                kept = fewer
        return kept


def _on_simplex(point: np.ndarray) -> np.ndarray:
    """The nearest point with no negative part and a sum of 1."""
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[np.flatnonzero(ordered > excess)[-1]], 0.0)


def _weighted(sums: Sequence[_Sum], weights: np.ndarray, out: RowCosts) -> list[np.ndarray]:
    """Costs of rows: the weighted sums, infinite where `out` is."""
    each = zip(*(one.costs for one in sums), strict=True)
    return [np.tensordot(weights, np.stack(costs), 1) + kept for costs, kept in zip(each, out, strict=True)]


def _not_worse(state: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Places of the rows of `sums` (n, m) that no row before, of the same state, is as good as in all sums."""
    kept = np.zeros(len(sums), bool)
    for one in np.unique(state):
        here = np.flatnonzero(state == one)
        best, count = np.empty((len(here), sums.shape[1])), 0
        for row in here:
            if not (best[:count] <= sums[row]).all(axis=1).any():
                best[count] = sums[row]
                count += 1
                kept[row] = True
    return np.flatnonzero(kept)


def _spaced(limit: Limit) -> str:
    at = f" at {limit.confidence:.0%}" if limit.confidence is not None else ""
    return f"{limit.key} {limit.operator} {_number(limit.value)}{at}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.6g}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share in (0.0, 1.0) or 0.01 <= share <= 0.99 else f"{100 * share:.2f} %"


def _reach(each: Range) -> str:
    return f"{each.limit.key} is reachable {each.reach}"


def _reached(limit: Limit, estimates: Estimates) -> str:
    end = estimates.judged_by(limit)[0]
    up_to = f" (up to {end:.6g})" if limit.confidence is not None else ""
    return f"{limit.key}={estimates.value[0]:.6g}{up_to}"
