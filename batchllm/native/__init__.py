"""Kernels in C++ for the CPU: attention over the prefix tree, and what lies between products."""
