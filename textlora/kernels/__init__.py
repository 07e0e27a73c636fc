"""The C kernels and what calls them: packed weights, fused operations, threads, devices."""
