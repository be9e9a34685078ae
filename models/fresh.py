"""First weights are drawn by many threads at once, each parameter's from a random generator of its own.

So they depend on the seed and on the parameter's name alone, and 10^9 of them do not wait for one thread, 5 s or more.
"""

import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)
_DRAWS = (nn.init.kaiming_uniform_, nn.init.uniform_, nn.init.normal_)
_SETS = (nn.init.constant_, Tensor.zero_, Tensor.fill_, Tensor.copy_)  # nn.init's zeros_ and ones_ call these of Tensor


def drawn_apart(build: Callable[[], Model]) -> Model:
    """Returns what `build` returns, with the weights that it draws by `nn.init` drawn parameter by parameter, under a
    seed that torch's generator gives."""
    seed = int(torch.randint(2**31, (), device="cpu"))
    with _Later() as later:
        model = build()

    def draw(name: str, weight: Tensor) -> None:
        generator = torch.Generator(weight.device).manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        later.draws[weight](generator=generator)

    drawn = [named for named in model.named_parameters() if named[1] in later.draws and not named[1].is_meta]
    with ThreadPoolExecutor() as threads:
        list(threads.map(draw, *zip(*drawn, strict=True)))  # making a list raises the errors of the threads
    return model


class _Later(TorchFunctionMode):
    """This mode keeps the draws that are asked for, but those of weights that are then set."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: dict[Tensor, Callable[..., Tensor]] = {}

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS:
            self.draws[kwargs["tensor"]] = partial(func, **kwargs)
            return kwargs["tensor"]
        if func in _SETS:
            self.draws.pop(args[0] if args else kwargs["tensor"], None)
        return func(*args, **kwargs)
