"""A checkpoint has an optimizer's numbers besides its tensors, so a resumed run steps as one that never stopped."""

from typing import Any

import torch
from torch import Tensor

from moc.errors import UserError

Group = dict[str, Any]


class GroupNumbers:
    """This object saves the numbers that an optimizer itself changes in its groups, as schedule-free ones do with their
    sums of weights and optimi's with their count of steps. Settings are not among them: those come from the
    configuration.

    optimizer: as it was built, before its first step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._built = [_numbers(group) for group in optimizer.param_groups]

    def state(self) -> dict[str, Any]:
        """Returns, JSON-ready, each group's changes and the names of states that no parameter has a value of."""
        pairs = zip(self._optimizer.param_groups, self._built, strict=True)
        groups = [
            {key: value for key, value in _numbers(group).items() if key not in built or built[key] != value}
            for group, built in pairs
        ]
        states = self._optimizer.state.values()
        return {"groups": groups, "empty": sorted({k for state in states for k, v in state.items() if v is None})}

    def restore(self, stored: dict[str, Any]) -> None:
        """Takes what `state` gave, after the states by parameter are loaded. Raises UserError for other groups."""
        groups = self._optimizer.param_groups
        if any(stored["groups"]) and len(stored["groups"]) != len(groups):
            raise UserError(
                f"the optimizer kept numbers of {len(stored['groups'])} groups of parameters, and has {len(groups)}: "
                "resume with the optim.rates that the run began with"
            )
        for group, numbers in zip(groups, stored["groups"], strict=False):
            group.update({key: _loaded(value) for key, value in numbers.items()})
        for state in self._optimizer.state.values():
            state.update(dict.fromkeys(stored["empty"]))


def _numbers(group: Group) -> dict[str, Any]:
    """Returns the numbers of a group, and its tensors of one number with their dtype."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, Tensor) and value.dim() == 0:
            found[key] = {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
        elif isinstance(value, int | float) and key != "lr":  # the trainer sets it at every step
            found[key] = value
    return found


def _loaded(value: Any) -> Any:
    return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"])) if isinstance(value, dict) else value
