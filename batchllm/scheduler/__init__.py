"""Which tokens the next step computes. Pure Python and numpy: no model, no torch."""
