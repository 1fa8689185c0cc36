"""Random damage to everything a user or a stranger hands in; `scripts/fuzz.py` runs it."""
