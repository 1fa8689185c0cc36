"""Samples as a scheduler hands them out."""

import numpy as np

from batchllm.scheduler.batch import Samples


def make_samples(each, rows=None, positions=None):
    """Samples of rows with these parameters, one a row."""
    count = np.arange(len(each))
    rows = count if rows is None else rows
    positions = np.zeros_like(count) if positions is None else positions
    return Samples(count, count, count, rows, positions, count, each)
