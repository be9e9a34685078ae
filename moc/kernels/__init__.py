"""Fast backends of MoC attention, each equal to `moc.reference`: `torch_backend` (stock kernels), `triton_backend`."""
