"""GPU kernels for the layers of Mixture-of-Experts models: one text for Metal and CUDA.

The package knows arrays and matrices, but no models: `flashmoe.ops.gpu` calls it.
"""
