"""Layers on the CPU, as numba kernels."""
