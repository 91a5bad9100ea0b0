"""How sure a performance is: bootstrap over the items of an evaluation. Efron and Tibshirani 1993, chapter 13."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    import numpy as np

RESAMPLES: Final = 2000
SEED: Final = 0  # of the resampling, so that a report is the same each time
Items = Mapping[str, Sequence[float]]  # `scored` and `weights`, as an evaluation left them


class Interval(NamedTuple):
    """An estimate with the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def performance(items: Items) -> Interval:
    """Of one model on the items of one role: resampled with replacement, the percentiles of the quotient of sums."""
    import numpy as np

    scored, weights = np.array(items["scored"]), np.array(items["weights"])
    drawn = _drawn(len(scored))
    return _interval(scored.sum() / weights.sum(), (drawn @ scored) / (drawn @ weights))


def difference(a: Items, b: Items) -> Interval | None:
    """Of two models on the same items, a - b: both are resampled together. None where their items are not the same."""
    import numpy as np

    if list(a["weights"]) != list(b["weights"]):
        return None
    scored, other, weights = np.array(a["scored"]), np.array(b["scored"]), np.array(a["weights"])
    drawn = _drawn(len(scored))
    return _interval((scored - other).sum() / weights.sum(), (drawn @ (scored - other)) / (drawn @ weights))


@lru_cache(maxsize=4)  # a setting's evaluations have one or two sizes, and a report hundreds of intervals
def _drawn(size: int) -> "np.ndarray":
    """How often each item is in each resample: [RESAMPLES, size]."""
    import numpy as np

    return np.random.default_rng(SEED).multinomial(size, np.full(size, 1 / size), size=RESAMPLES)


def _interval(value: float, resampled: "np.ndarray") -> Interval:
    import numpy as np

    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))
