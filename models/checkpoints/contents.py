"""`Contents` tells what a path holds: a run, a training checkpoint, a diffusers pipeline, Wan2.2's release or a model.

Only this module knows the names of the folders in them. It answers with paths and settings; `opening.py` beside it
reads the weights, `models/encoders/pair.py` the encoders.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

from moc import MoCConfig
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training.checkpoint import find_checkpoint, read_json, read_state, remedy, sound_checkpoint
from moc.training.integrity import COMPLETE

# A checkpoint, a diffusers pipeline and Wan2.2's release keep their models here; of two experts high noise is first.
MODEL_FOLDERS = ("ema", "model")
EXPERT_FOLDERS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
PIPELINE_FILE = "model_index.json"  # the file that makes a folder a diffusers pipeline


@dataclass(frozen=True)
class Contents:
    """This object answers what `path` holds; nothing is read before it is asked for.

    Raises UserError, as it is asked, where a file is not what it should be.
    """

    path: Path

    @classmethod
    def at(cls, path: "str | Path | Contents") -> "Contents":
        """Returns what a path holds, not looked through for damage; `Contents` stay as they are, here and in
        `sound`."""
        return path if isinstance(path, Contents) else cls(Path(path))

    @classmethod
    def sound(cls, path: "str | Path | Contents", weights: str = "ema") -> "Contents":
        """Returns the newest checkpoint of a run whose files are what was written; any other `path` as it is.

        weights: ema or model, those that are to be read. Raises UserError where every checkpoint is damaged.
        """
        if isinstance(path, Contents):
            return path
        return cls(sound_checkpoint(path, weights) or Path(path))

    @cached_property
    def root(self) -> Path:
        """Returns the checkpoint or the pipeline that `path` is, or whose model's folder it is; else `path` itself."""
        folders = {*MODEL_FOLDERS, *chain(*EXPERT_FOLDERS)}
        is_inner = self.path.name in folders and any(
            (self.path.parent / mark).is_file() for mark in (COMPLETE, PIPELINE_FILE)
        )
        return find_checkpoint(self.path) or (self.path.parent if is_inner else self.path)

    def model_path(self, weights: str) -> Path:
        """Returns the file or folder of the model itself: inside a run, a checkpoint or a pipeline."""
        if not self.path.is_dir():
            return self.path
        checkpoint = find_checkpoint(self.path)
        if checkpoint is not None:
            folder = checkpoint / weights
            return folder if folder.is_dir() else checkpoint / "model"
        if self.experts:
            raise UserError(
                f"{self.path} holds two noise experts, {[expert.name for expert in self.experts]}: name the path "
                "of one; they are trained one at a time"
            )
        experts = [self.path / name for pair in EXPERT_FOLDERS for name in pair if (self.path / name).is_dir()]
        return experts[0] if experts else self.path

    @property
    def experts(self) -> tuple[Path, Path] | None:
        """Finds the high-noise and the low-noise model in a folder of both: a diffusers pipeline, the release, or two
        files such as HoloCine's full_high_noise.safetensors and full_low_noise.safetensors; None where there are not
        two.

        Raises UserError where there are several such pairs.
        """
        if not self.path.is_dir():
            return None
        pairs = [(self.path / high, self.path / low) for high, low in EXPERT_FOLDERS]
        for high in self.path.glob("*high_noise*.safetensors"):
            pairs.append((high, high.with_name(high.name.replace("high_noise", "low_noise"))))
        found = sorted(pair for pair in pairs if all(expert.exists() for expert in pair))
        if len(found) > 1:
            raise UserError(
                f"{self.path} holds several pairs of noise experts, {[high.name for high, _ in found]} and their "
                "counterparts: name the two of one pair (sample.py: checkpoint=HIGH low_noise_checkpoint=LOW)"
            )
        return found[0] if found else None

    @property
    def flow(self) -> Flow:
        """Tells the noise convention of a run, a checkpoint, a pipeline or a model's folder; the default one where it
        does not say."""
        if not (self.root / "state.json").exists():
            return _scheduler_flow(self.root / "scheduler" / "scheduler_config.json")
        try:
            return Flow(**read_state(self.root)["flow"])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{self.root / 'state.json'} tells no noise convention ({error}); {remedy(self.root)}"
            ) from None

    @property
    def own_flow(self) -> Flow:
        """Returns `flow`, which for a pipeline's expert covers its own noise levels alone: from the pipeline's
        boundary_ratio on, or up to it."""
        boundary = _boundary_ratio(self.root / PIPELINE_FILE)
        high, low = zip(*EXPERT_FOLDERS, strict=True)
        if boundary is not None and self.path.name in high:
            return replace(self.flow, sigma_min=boundary)
        if boundary is not None and self.path.name in low:
            return replace(self.flow, sigma_max=boundary)
        return self.flow

    @property
    def moc(self) -> MoCConfig:
        """Reads the attention settings; gives the default ones where there are none."""
        return self.stored_moc or MoCConfig()

    @property
    def stored_moc(self) -> MoCConfig | None:
        """Reads the attention settings beside the weights; None where there are none."""
        return MoCConfig.load(self.moc_folder) if self.moc_folder else None

    @cached_property
    def moc_folder(self) -> Path | None:
        """Says where moc.json lies."""
        names = ("", *MODEL_FOLDERS, *chain(*EXPERT_FOLDERS))
        folders = [base / name for base in (self.path, self.root) for name in names]
        return next((folder for folder in folders if (folder / "moc.json").is_file()), None)


def _boundary_ratio(file: Path) -> float | None:
    ratio = read_json(file).get("boundary_ratio") if file.is_file() else None
    if ratio is not None and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise UserError(f"{file}: boundary_ratio={ratio!r} must be a number between 0 and 1; fetch it again")
    return ratio


def _scheduler_flow(file: Path) -> Flow:
    """Returns the flow of a pipeline's scheduler; UniPC and its like call the shift flow_shift, Euler shift."""
    config = read_json(file) if file.is_file() else {}
    shift = config.get("flow_shift", config.get("shift", Flow.shift))
    if not isinstance(shift, int | float) or shift <= 0:
        raise UserError(f"{file}: the flow shift {shift!r} must be a number above 0; fetch it again, or set shift")
    return Flow(shift=float(shift))
