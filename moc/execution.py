"""`Execution` says how attention is computed (`moc.config` says to what); it belongs to a run, never to weights."""

from dataclasses import dataclass
from enum import StrEnum

from moc.errors import set_types


class Backend(StrEnum):
    """A backend says who computes the attention; `auto` takes the fastest that fits the device."""

    auto = "auto"
    reference = "reference"
    torch = "torch"
    triton = "triton"


@dataclass(frozen=True)
class Execution:
    """These settings say how `moc.moc_attention` computes; the result is the same but for rounding.

    backend: who computes it; auto takes the fastest that fits.
    dense_kernel: the name of the dense kernel for anchors; auto takes the fastest present.
    deterministic: whether gradients are bitwise repeatable, at some cost in speed.

    Strings are accepted for the backend. Raises UserError for values of another type and for an unknown backend.
    """

    backend: Backend = Backend.auto
    dense_kernel: str = "auto"
    deterministic: bool = False

    def __post_init__(self) -> None:
        set_types(self, "execution")

    @staticmethod
    def of(given: "Execution | str | None") -> "Execution":
        """Returns an execution as it is, that of a backend's name, or the default one for None."""
        return given if isinstance(given, Execution) else _NAMED.get(given) or Execution(given)  # type: ignore[arg-type]


AUTO = Execution()
# torch 2.11 cannot compile how one is made.
_NAMED = {None: AUTO} | {backend.value: Execution(backend) for backend in Backend}
