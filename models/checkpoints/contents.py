"""What a path holds: a run, a training checkpoint, a diffusers pipeline, the release of Wan2.2 or a model by itself.

Only this module knows the names of the folders in them. It answers with paths and settings; `opening.py` beside it
reads the weights.
"""

from dataclasses import replace
from itertools import chain
from pathlib import Path

from moc import MoCConfig
from moc.diffusion import Flow
from moc.errors import UserError
from moc.training.checkpoint import find_checkpoint, read_json, read_state, remedy
from moc.training.integrity import COMPLETE

# A checkpoint, a diffusers pipeline and the release of Wan2.2 keep their models here; of two experts high noise first.
MODEL_FOLDERS = ("ema", "model")
EXPERT_FOLDERS = (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model"))
PIPELINE_FILE = "model_index.json"  # the file that makes a folder a diffusers pipeline


def root_of(path: str | Path) -> Path:
    """The checkpoint or the diffusers pipeline that `path` is, or whose model's folder it is; else `path` itself."""
    path = Path(path)
    folders = {*MODEL_FOLDERS, *chain(*EXPERT_FOLDERS)}
    is_part = path.name in folders and any((path.parent / mark).is_file() for mark in (COMPLETE, PIPELINE_FILE))
    return find_checkpoint(path) or (path.parent if is_part else path)


def model_path(path: Path, weights: str) -> Path:
    """The file or folder of the model itself: inside a run, a checkpoint or a pipeline."""
    if not path.is_dir():
        return path
    checkpoint = find_checkpoint(path)
    if checkpoint is not None:
        folder = checkpoint / weights
        return folder if folder.is_dir() else checkpoint / "model"
    experts = expert_paths(path)
    if experts:
        raise UserError(
            f"{path} holds two noise experts, {[expert.name for expert in experts]}: name the path of one; they are "
            "trained one at a time"
        )
    parts = [path / name for pair in EXPERT_FOLDERS for name in pair if (path / name).is_dir()]
    return parts[0] if parts else path


def expert_paths(path: Path) -> tuple[Path, Path] | None:
    """The high-noise and the low-noise model in a folder of both: a diffusers pipeline, the release, or two files such
    as HoloCine's full_high_noise.safetensors and full_low_noise.safetensors; None where there are not two.

    Raises UserError where there are several such pairs.
    """
    if not path.is_dir():
        return None
    pairs = [(path / high, path / low) for high, low in EXPERT_FOLDERS]
    for high in path.glob("*high_noise*.safetensors"):
        pairs.append((high, high.with_name(high.name.replace("high_noise", "low_noise"))))
    found = sorted(pair for pair in pairs if all(part.exists() for part in pair))
    if len(found) > 1:
        raise UserError(
            f"{path} holds several pairs of noise experts, {[high.name for high, _ in found]} and their counterparts: "
            "name the two of one pair (sample.py: checkpoint=HIGH low_noise_checkpoint=LOW)"
        )
    return found[0] if found else None


def read_flow(path: Path) -> Flow:
    """The noise convention of a run, a checkpoint, a pipeline or a model's folder. That of a pipeline's expert covers
    its own noise levels alone: from the pipeline's boundary_ratio on, or up to it."""
    flow, boundary = read_settings(path)[1], _boundary_ratio(root_of(path) / PIPELINE_FILE)
    high, low = zip(*EXPERT_FOLDERS, strict=True)
    if boundary is not None and path.name in high:
        return replace(flow, sigma_min=boundary)
    if boundary is not None and path.name in low:
        return replace(flow, sigma_max=boundary)
    return flow


def _boundary_ratio(file: Path) -> float | None:
    ratio = read_json(file).get("boundary_ratio") if file.is_file() else None
    if ratio is not None and not (isinstance(ratio, float) and 0 < ratio < 1):
        raise UserError(f"{file}: boundary_ratio={ratio!r} must be a number between 0 and 1; fetch it again")
    return ratio


def read_settings(path: str | Path) -> tuple[MoCConfig, Flow]:
    """The attention settings and the noise convention of a run, a checkpoint, a diffusers pipeline or a model's folder;
    the default ones where it does not say."""
    root = root_of(path)
    if (root / "state.json").exists():
        try:
            flow = Flow(**read_state(root)["flow"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{root / 'state.json'} tells no noise convention ({error}); {remedy(root)}") from None
    else:
        flow = _scheduler_flow(root / "scheduler" / "scheduler_config.json")
    return read_moc(path) or MoCConfig(), flow


def read_moc(path: str | Path) -> MoCConfig | None:
    """The attention settings beside the weights, wherever those are; None where there are none."""
    names = ("", *MODEL_FOLDERS, *chain(*EXPERT_FOLDERS))
    folders = [place / name for place in (Path(path), root_of(path)) for name in names]
    folder = next((f for f in folders if (f / "moc.json").is_file()), None)
    return MoCConfig.load(folder) if folder else None


def _scheduler_flow(file: Path) -> Flow:
    """Returns the flow of a pipeline's scheduler; UniPC and its like call the shift flow_shift, Euler shift."""
    config = read_json(file) if file.is_file() else {}
    shift = config.get("flow_shift", config.get("shift", Flow.shift))
    if not isinstance(shift, int | float) or shift <= 0:
        raise UserError(f"{file}: the flow shift {shift!r} must be a number above 0; fetch it again, or set shift")
    return Flow(shift=float(shift))
