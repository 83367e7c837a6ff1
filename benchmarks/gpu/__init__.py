"""Measure the GPU kernels, and whole models that use them. See run.py."""
