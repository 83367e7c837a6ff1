"""GPU kernels of the expert block, one text for Metal and CUDA. Knows nothing of models."""
