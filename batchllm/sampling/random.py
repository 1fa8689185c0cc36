"""Random numbers that depend on who asks, never on who else does."""

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def uniform(
    seed: NDArray[np.int64], row_index: NDArray[np.int64], position: NDArray[np.int64]
) -> NDArray[np.float64]:
    """One number in [0, 1) for each (seed, row, output position), all [n].

    A counter-based generator: splitmix64's finaliser (Steele, Lea and Flood, 2014) applied to the
    three numbers in turn. No state, so any order of drawing gives the same numbers.
    """
    with np.errstate(over="ignore"):
        state = _mix(seed.astype(np.uint64) + _GOLDEN)
        state = _mix(state ^ _mix(row_index.astype(np.uint64) + _GOLDEN))
        state = _mix(state + (position.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
