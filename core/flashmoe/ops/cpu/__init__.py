"""Compute layers on the CPU with numba kernels."""

from ..compiled_code import compare_all_sources, protect_numba

# Before the kernels are defined.
protect_numba()
compare_all_sources()
