"""Model configurations, checkpoints and their loaders, and one file an architecture."""
