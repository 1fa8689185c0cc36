"""Attention over a step's items: shared segments once for all members, private ones apart."""
