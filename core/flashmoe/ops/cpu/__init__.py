"""Compute layers on the CPU with numba kernels."""
