"""One table on many workers: what every engine's integration is made of."""
