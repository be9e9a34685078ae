"""This module finds what the Triton kernels are compiled for, and to, on a machine without a GPU.

The launchers run as they do on a GPU of a given compute capability, but on small CPU tensors, and each launch is
written down instead of done. Its *variant* is what Triton compiles a kernel for: types, constants, alignments, options.

Compiling needs Triton as it is, not its interpreter (TRITON_INTERPRET=0), and the assembler that its package brings.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import jit

from moc.kernels import sizes, triton_routed, triton_shortlist

Capability = tuple[int, int]
# Shared memory that one program may have, in bytes, by compute capability.
SHARED_MEMORY = {
    (8, 0): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10, (10, 3): 227 << 10,
    (12, 0): 99 << 10,
}  # fmt: skip
FEW_BYTES = 64  # bytes that a thread may spill without a loop getting slower
# Bytes that kernels spill with blocks that were measured to be the fastest nevertheless: dq of small chunks on an H100.
MEASURED_SPILLS = {("dq_kernel", (9, 0)): 136}


@dataclass(frozen=True)
class Launch:
    """A launch is a kernel and its arguments. specialization: the type and the attributes of each, as Triton sees
    them."""

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
        """Returns the key under which Triton keeps what it has compiled for this launch."""
        kinds = zip(self.arguments, self.specialization, strict=True)
        constants = [self.arguments[name] for name, kind in kinds if kind[0] == "constexpr"]
        return f"{self.name} {self.specialization} {constants} {sorted(self.options.items())}"


@dataclass(frozen=True)
class Compiled:
    """These numbers say what a kernel takes on a GPU. spilled: bytes of a thread's registers that went to memory;
    shared: bytes."""

    name: str
    warps: int
    registers: int
    spilled: int
    shared: int


def _target(capability: Capability) -> GPUTarget:
    return GPUTarget("cuda", 10 * capability[0] + capability[1], 32)


@contextmanager
def recorded(capability: Capability) -> Iterator[list[Launch]]:
    """Adds launches made within to the list it yields, with the blocks for a GPU of this capability; no kernel runs.

    What kernels should have written stays as it was allocated.
    """
    launches: list[Launch] = []
    backend = make_backend(_target(capability))

    def get_launcher(kernel, grid):
        settings = getattr(kernel, "kwargs", {})  # an interpreted kernel keeps those of its decorator here
        plain = jit.JITFunction(kernel.fn, **settings) if settings else kernel
        bind = jit.create_function_from_signature(plain.signature, plain.params, backend)
        return lambda *args, **kwargs: launches.append(Launch(kernel, capability, *bind(*args, **kwargs)))

    with ExitStack() as stack:
        stack.enter_context(patch.object(jit.KernelInterface, "__getitem__", get_launcher))
        for module in (sizes, triton_routed, triton_shortlist):
            stack.enter_context(patch.object(module, "capability", lambda device: capability))
        yield launches


def compiled(launch: Launch) -> Compiled:
    """Compiles the kernel of a launch for its GPU; raises what Triton and the assembler raise."""
    backend = make_backend(_target(launch.capability))
    bound = (backend, launch.options, launch.arguments, launch.specialization, launch.options)
    options, signature, constants, attributes = launch.kernel._pack_args(*bound)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    kernel = triton.compile(source, target=backend.target, options=options.__dict__)
    registers, spilled = _usage(kernel.asm["cubin"])
    return Compiled(launch.name, kernel.metadata.num_warps, registers, spilled, kernel.metadata.shared)


def excesses(kernel: Compiled, capability: Capability) -> list[str]:
    """Says what a kernel takes too much of: shared memory, of which its GPU has less, or registers, of which it spills
    more than FEW_BYTES."""
    found, limit = [], SHARED_MEMORY[capability]
    if kernel.shared > limit:
        found.append(f"takes {kernel.shared} bytes of shared memory, of {limit}")
    if kernel.spilled > MEASURED_SPILLS.get((kernel.name, capability), FEW_BYTES):
        found.append(f"spills {kernel.spilled} bytes of registers a thread: give it smaller blocks")
    return found


@contextmanager
def parsed_in_turn() -> Iterator[None]:
    """While it lasts, threads parse kernels one after another: CPython 3.11 counts the depth of syntax trees for all
    threads together, and raises SystemError where one has changed another's count."""
    lock, parse = Lock(), jit.JITFunction.parse

    def parse_alone(kernel: Any) -> Any:
        with lock:
            return parse(kernel)

    with patch.object(jit.JITFunction, "parse", parse_alone):
        yield


def _usage(binary: bytes) -> tuple[int, int]:
    """Returns a thread's registers and bytes of stack, which are spills: the kernels have no arrays of their own."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if numbers is None:
        raise RuntimeError(f"cuobjdump tells no registers: {text}")
    return int(numbers[1]), int(numbers[2])
