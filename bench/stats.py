"""The statistics behind every figure. Pure: no clock, no file, no process; chance comes in as a seed.

A round measures all subjects one after another, so what the shared machine does to one it does, roughly, to its
neighbour. Therefore the unit of evidence is the ratio *within* a round, and the figure is the median of these ratios:
one disturbed round moves a mean, not a median. The interval is a percentile bootstrap of that median. Nothing is
dropped.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

RESAMPLES = 5000
CONFIDENCE = 0.95
SEED = 20240229


@dataclass(frozen=True, slots=True)
class Estimate:
    """A median with its 95 % interval, and how many rounds it stands on."""

    value: float
    low: float
    high: float
    rounds: int

    @property
    def width(self) -> float:
        return self.high - self.low


def percentile(ordered: Sequence[float], share: float) -> float:
    """The `share` quantile (0..1) of an already sorted sequence, linear between neighbours."""
    if not ordered:
        raise ValueError("no samples")
    position = share * (len(ordered) - 1)
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ratios(subject: Sequence[float], base: Sequence[float]) -> list[float]:
    """Round by round subject/base. Both come from the same rounds, so unequal lengths are a bug of the caller."""
    if len(subject) != len(base):
        raise ValueError(f"unpaired rounds: {len(subject)} and {len(base)}")
    if any(value <= 0 for value in base):
        raise ValueError("a base that is not positive has no ratio")
    return [ours / theirs for ours, theirs in zip(subject, base, strict=True)]


def estimate(values: Sequence[float], seed: int = SEED, resamples: int = RESAMPLES) -> Estimate:
    """Median of `values` and its bootstrap interval. The same values and seed give the same interval, always."""
    if not values:
        raise ValueError("no rounds")
    dice = random.Random(seed)
    count = len(values)
    medians = sorted(median(dice.choices(values, k=count)) for _ in range(resamples))
    tail = (1 - CONFIDENCE) / 2
    return Estimate(median(values), percentile(medians, tail), percentile(medians, 1 - tail), count)


def drift(values: Sequence[float]) -> float:
    """Spread of a baseline over the rounds: (largest - smallest) / median. Large means the machine was not quiet."""
    return (max(values) - min(values)) / median(values)


def holds(result: Estimate, bound: float, at_most: bool, strict: bool = False) -> bool:
    """Does a figure keep its bound?

    Loose, the rule for most figures: it holds unless the whole interval lies beyond the bound; noise alone condemns
    nothing. Strict: the whole interval must lie within it, for claims so close to 1 that loose would prove nothing.
    """
    if at_most:
        return (result.high if strict else result.low) <= bound
    return (result.low if strict else result.high) >= bound
