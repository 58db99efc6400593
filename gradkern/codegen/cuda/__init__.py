"""Records, weights and prices of the GPU kernels."""
