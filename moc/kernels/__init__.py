"""The fast backends of MoC attention equal `moc.reference`: `torch_backend` (stock kernels) and `triton_backend`."""

from importlib.util import find_spec

HAS_TRITON = find_spec("triton") is not None
