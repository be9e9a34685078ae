"""Settings that earlier versions wrote, in a run's config.yaml, a model's moc.json and a film's metadata, are read by
today's names. Each package that has some keeps them in its `earlier.py`; `configs.earlier` unites them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any


def with_nulls(settings: Mapping[str, Any], unset: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings, null where they hold what said in earlier versions that nothing is set."""
    return {name: None if name in unset and value == unset[name] else value for name, value in settings.items()}


@dataclass(frozen=True)
class Earlier:
    """This record says how earlier versions wrote the settings of one owner.

    owner: the group of the settings, such as "optim", which their dotted keys begin with.
    renamed: today's name of a setting, by the dotted key that it had.
    unset: the value that said that nothing is set, by today's name of the setting; null says it now.
    moved: names of settings that belong to another owner now.
    """

    owner: str
    renamed: Mapping[str, str] = field(default_factory=dict)
    unset: Mapping[str, Any] = field(default_factory=dict)
    moved: Collection[str] = ()

    def translated(self, stored: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the owner's settings, by name, as today's version would have written them."""
        names = {old.removeprefix(f"{self.owner}."): name for old, name in self.renamed.items()}
        found = {names.get(name, name): value for name, value in stored.items() if name not in self.moved}
        return with_nulls(found, self.unset)

    def as_written(self, name: str, value: Any) -> Any:
        """Returns the value of a setting as files have it whose names are hashes of what they hold."""
        return self.unset[name] if value is None else value


_HOW = ("backend", "dense_kernel", "deterministic")  # how attention is computed stood among what it attends to
MOC = Earlier("moc", renamed={"moc.descriptor_parts": "descriptor_subchunks"}, moved=(*_HOW, "cut_gap"))
EXECUTION = Earlier("execution", renamed={f"moc.{name}": name for name in _HOW})
OPTIM = Earlier("optim", renamed={"optim.parts": "rates"})
PARALLEL = Earlier("parallel", renamed={"parallel.recompute_parts": "recompute_sublayers"}, unset={"replicate": 0})
SAMPLER = Earlier("sampler", unset={"high_noise_guidance_scale": 0.0, "context_shots": 0})
