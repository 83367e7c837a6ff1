"""Compute layers on the CPU with numba kernels."""

from ..compiled_code import protect_numba

protect_numba()  # before the kernels are defined
