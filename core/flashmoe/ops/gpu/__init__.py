"""Layers on a GPU, by flashmoe's own kernels or by MLX's."""
