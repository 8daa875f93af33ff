"""Intervals of 95 % for tables: of a share of right answers, and of a ratio of perplexities."""

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
    gaps = [a - b for a, b in zip(losses, dense, strict=True)]
    rng = random.Random(0)
    means = sorted(sum(rng.choices(gaps, k=len(gaps))) / len(gaps) for _ in range(draws))
    low, high = means[int(0.025 * draws)], means[int(0.975 * draws)]
    return math.exp(sum(gaps) / len(gaps)), math.exp(low), math.exp(high)
