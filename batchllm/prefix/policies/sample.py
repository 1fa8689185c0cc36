"""A few rows first, to learn from."""

import numpy as np

from batchllm.prefix.tree import Ints, PrefixTree

_SHARE = 0.01  # of the leaves, and of the tokens that taking them out of their groups may cost


def sample_first(tree: PrefixTree, order: Ints) -> Ints:
    """The order with about 1 % of the leaves moved to its head, from all over it.

    What is learned from them about the lengths of answers holds for the whole window, whatever
    `order` starts with (BlendServe, ASPLOS'26, section 5.4). Their prefixes may have to be computed
    again when their groups' turn comes, so the sample ends where that could exceed 1 % of the work.
    """
    wanted = int(len(order) * _SHARE)
    if wanted == 0:
        return order
    places = np.linspace(0, len(order) - 1, wanted).astype(np.int64)
    # Both ends of the window and then what lies between, so that a shorter sample is fair too.
    places = places[np.argsort(np.arange(wanted) * 0.618034 % 1, kind="stable")]
    again = np.cumsum(tree.leaf_start[order[places]])
    places = np.sort(places[again <= _SHARE * tree.num_tokens])
    return np.concatenate([order[places], np.delete(order, places)])
