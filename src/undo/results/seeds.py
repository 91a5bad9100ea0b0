"""Numbers of several seeds as one, where a run may have diverged: what is NaN is never passed over in silence."""

import math
import statistics
from collections.abc import Iterable


def median(values: Iterable[float]) -> float:
    """NaN if one of them is, whatever their order. Raises StatisticsError for none."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)
