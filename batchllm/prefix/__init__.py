"""Finding shared prompt prefixes in a window, and the order in which to run them."""
