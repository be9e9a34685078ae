"""The fast backends of MoC attention equal `moc.reference`: `torch_backend` (stock kernels) and `triton_backend`."""
