"""Fast backends of MoC attention, each equal to `moc.reference`: `torch_parts` (stock kernels), `triton_backend`."""
