"""Compute layers in plain MLX: the definition that the faster ones are tested against."""
