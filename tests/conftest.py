"""Here so that pytest puts this directory on the path: tests say `from builders import …`."""
