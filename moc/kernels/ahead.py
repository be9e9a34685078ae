"""What the Triton kernels are compiled for, and to, on a machine without a GPU.

The launchers run as they do on a GPU of a given compute capability, on small CPU tensors; each launch is written down
instead of done. Its *variant* is what Triton would compile it for: types, constants, alignments, block sizes.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from moc.kernels import triton_routed, triton_shortlist

Capability = tuple[int, int]


@dataclass(frozen=True)
class Launch:
    """A kernel and its arguments as Triton sees them: `specialization` holds the type and the attributes of each."""

    kernel: Any
    capability: Capability
    arguments: dict[str, Any]
    specialization: list[tuple]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def variant(self) -> str:
        """The key under which Triton keeps what it has compiled for this launch."""
        constants = [self.arguments[name] for name, kind in self._kinds() if kind == "constexpr"]
        return f"{self.name} {self.specialization} {constants} {sorted(self.options.items())}"

    def _kinds(self) -> Iterator[tuple[str, str]]:
        return ((name, spec[0]) for name, spec in zip(self.arguments, self.specialization, strict=True))


def target(capability: Capability) -> GPUTarget:
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


@contextmanager
def recorded(capability: Capability) -> Iterator[list[Launch]]:
    """Within it no kernel runs: launches are added to the list, with the blocks for a GPU of this capability.

    What kernels should have written stays as it was allocated.
    """
    launches: list[Launch] = []
    backend = make_backend(target(capability))

    def get_launcher(kernel, grid):
        settings = getattr(kernel, "kwargs", {})  # an interpreted kernel keeps those of its decorator here
        plain = jit.JITFunction(kernel.fn, **settings) if settings else kernel
        bind = jit.create_function_from_signature(plain.signature, plain.params, backend)
        return lambda *args, **kwargs: launches.append(Launch(kernel, capability, *bind(*args, **kwargs)))

    with ExitStack() as stack:
        stack.enter_context(patch.object(jit.KernelInterface, "__getitem__", get_launcher))
        for module in (triton_routed, triton_shortlist):
            stack.enter_context(patch.object(module, "capability", lambda device: capability))
        yield launches
