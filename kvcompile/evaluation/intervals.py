"""Intervals of 95 %: of a share of right answers, of a mean, and of a ratio of perplexities. Standard errors."""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

Z = 1.959964


def wilson(right: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share, in [0, 1]: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    Of scores in [0, 1] that need not be whole it is never too narrow: their variance is at most p (1 - p).
    """
    share, spread = right / count, Z * Z / count
    middle = share + spread / 2
    reach = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    low, high = (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)
    return max(0.0, min(share, low)), min(1.0, max(share, high))  # rounding would leave shares of 0 and 1 outside


def ratio(losses: Sequence[float], dense: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """exp(mean of losses - dense), and its percentile bootstrap interval over the same windows of both."""
    middle, low, high = mean([a - b for a, b in zip(losses, dense, strict=True)], draws)
    return math.exp(middle), math.exp(low), math.exp(high)


def mean(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The mean, and its percentile bootstrap interval: the same for the same values."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    middle = sum(values) / len(values)
    return middle, min(middle, means[int(0.025 * draws)]), max(middle, means[int(0.975 * draws)])


def ratio_of_sums(tops: Sequence[float], bottoms: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """sum(tops) / sum(bottoms) and its percentile bootstrap interval over pairs: the same for the same values.

    Draws whose bottoms are all 0 do not count. One pair has no interval: both ends are the ratio.
    """
    middle = sum(tops) / sum(bottoms)
    if len(tops) == 1:
        return middle, middle, middle
    sums = ((sum(draw(tops)), sum(draw(bottoms))) for draw in _resamples(len(tops), draws))
    ratios = sorted(top / bottom for top, bottom in sums if bottom)
    return middle, min(middle, ratios[int(0.025 * len(ratios))]), max(middle, ratios[int(0.975 * len(ratios))])


@functools.lru_cache(maxsize=4)
def _resamples(count: int, draws: int) -> list[Callable[[Sequence[float]], Any]]:
    """Functions that draw as many values as there are, with replacement."""
    rng = random.Random(0)
    return [itemgetter(*rng.choices(range(count), k=count)) for _ in range(draws)]


def standard_error(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean of the groups' means, and its standard error: sqrt(sum (m_i - m)^2 / (n (n - 1))); 0 of one group.

    Values of one group, such as questions about one text, need not be independent.
    """
    means = [statistics.fmean(values) for values in groups]
    spread = statistics.stdev(means) if len(means) > 1 else 0.0
    return statistics.fmean(means), spread / math.sqrt(len(means))
