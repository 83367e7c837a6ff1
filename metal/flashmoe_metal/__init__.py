"""GPU kernels of the expert block, one text for Metal and CUDA. Knows MLX, and nothing of models."""
