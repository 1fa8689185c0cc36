"""In which order a window's leaves are admitted: one policy a file, listed in `registry`."""
