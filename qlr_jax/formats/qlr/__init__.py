"""The packed folder: how it is written and read in JAX, its PyTorch runtime, and Triton kernels for it."""
