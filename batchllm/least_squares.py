"""Fitting what things cost to measured times."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def least_squares(rows: Floats, wanted: Floats) -> Floats:
    """Figures, none negative, whose products with `rows` [n, figures] come near `wanted` [n].

    Those that would be negative are set to 0, and the others fitted again.
    """
    scale = np.abs(rows).max(axis=0)
    scale[scale == 0] = 1.0
    kept = np.ones(rows.shape[1], dtype=np.bool_)
    found: Floats = np.zeros(rows.shape[1])
    while kept.any():
        part, *_ = np.linalg.lstsq(rows[:, kept] / scale[kept], wanted, rcond=None)
        if (part >= 0).all():
            found[kept] = part / scale[kept]
            break
        places = np.flatnonzero(kept)
        kept[places[part < 0]] = False
    return found
