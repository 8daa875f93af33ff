"""Intervals of 95 %: of a share of right answers, of a mean, and of a ratio of perplexities."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

Z = 1.959964


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval of a share: (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)."""
    share, spread = right / count, Z * Z / count
    middle = share + spread / 2
    reach = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)


def ratio(losses: Sequence[float], dense: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """exp(mean of losses - dense), and its percentile bootstrap interval over the same windows of both."""
    middle, low, high = mean([a - b for a, b in zip(losses, dense, strict=True)], draws)
    return math.exp(middle), math.exp(low), math.exp(high)


def mean(values: Sequence[float], draws: int = 2000) -> tuple[float, float, float]:
    """The mean, and its percentile bootstrap interval: the same for the same values."""
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    return sum(values) / len(values), means[int(0.025 * draws)], means[int(0.975 * draws)]
