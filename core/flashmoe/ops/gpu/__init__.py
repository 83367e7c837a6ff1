"""Compute layers on a GPU, with flashmoe's own kernels or MLX's."""
