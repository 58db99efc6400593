"""Records, weights and costs of the GPU kernels."""
