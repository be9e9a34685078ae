"""A codec and a text encoder stand between pixels, words and the transformer, and are kept together.

A prepared folder and every checkpoint hold them as `encoders/`, so that whoever has the latents or the model can decode
and prompt with just what made them. Embedded encoders are stored whole; large ones by the path they were loaded from.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from moc.errors import UserError
from moc.training.checkpoint import read_json
from models.checkpoints.contents import Contents
from models.checkpoints.tensors import download_hint
from models.earlier import CODEC, TEXT
from models.encoders.codec import Codec, CodecConfig, CodecKind
from models.encoders.lapped import LappedCodec
from models.encoders.text import EmbeddedTextEncoder, PromptForm, TextConfig, TextEncoder, TextKind, build_text_encoder

FILE = "encoders.json"
PIPELINE = ("vae", "text_encoder", "tokenizer")  # a diffusers pipeline of Wan has these besides the transformer


@dataclass(frozen=True)
class EncodersConfig:
    """These settings name the codec and the text encoder that make a cache.

    codec: between frames and latents.
    text: between captions and features.
    """

    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True)
class Encoders:
    """These are a codec and a text encoder, and the settings they were built by."""

    config: EncodersConfig
    codec: Codec
    text: TextEncoder

    def save(self, folder: str | Path) -> None:
        """Writes what `load_encoders` needs into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(self.config, folder)
        if isinstance(self.text, EmbeddedTextEncoder):
            self.text.save(folder)


def build_codec(config: CodecConfig) -> Codec:
    """Returns the codec a configuration names, on the CPU."""
    if config.kind is not CodecKind.wan:
        return LappedCodec(config)
    from models.encoders.vae import WanCodec  # imports much of diffusers, so only where it is used

    return WanCodec(config)


def build_encoders(config: EncodersConfig, vocabulary: Iterable[str] = ()) -> Encoders:
    """Builds codec and text encoder of a configuration; `vocabulary` is for an embedded text encoder without a path."""
    return Encoders(config, build_codec(config.codec), build_text_encoder(config.text, vocabulary))


def load_encoders(path: str | Path | Contents) -> Encoders:
    """Returns the encoders at `path`, as `read_encoders` finds them; raises UserError where they come out different."""
    return build_encoders(read_encoders(path))


def load_codec(path: str | Path | Contents) -> Codec:
    """Returns the codec of the encoders at `path`; raises UserError as `load_encoders` does."""
    return load_encoders(path).codec


def read_encoders(path: str | Path | Contents) -> EncodersConfig:
    """Returns what `find_encoders` finds; raises UserError where there are none."""
    contents = Contents.at(path)
    found, path = find_encoders(contents), contents.path
    if found is None and not path.exists():
        hint = download_hint(path) or "; name a run, a checkpoint, a folder of encoders or a diffusers pipeline"
        raise UserError(f"{path} does not exist{hint}")
    if found is None:
        raise UserError(
            f"{path} holds no encoders: neither {FILE}, which prepare_data and train.py write, nor "
            f"{', '.join(PIPELINE)} as a diffusers pipeline does; name a folder that does with encoders_path=FOLDER"
            f"{download_hint(path)}"
        )
    return found


def find_encoders(path: str | Path | Contents) -> EncodersConfig | None:
    """Returns the encoders of a folder that `Encoders.save` wrote, of a run or checkpoint, or of a diffusers pipeline
    of Wan, which its transformer's folder names as well. An embedded text encoder's path is where it lies."""
    root = Contents.at(path).root
    for folder in (root, root / "encoders"):
        if (folder / FILE).is_file():
            return _read_config(folder)
    if not all((root / name).is_dir() for name in PIPELINE):
        return None
    pipeline = root.resolve()
    codec = CodecConfig(kind=CodecKind.wan, path=str(pipeline / "vae"))
    return EncodersConfig(codec, TextConfig(kind=TextKind.t5, path=str(pipeline), form=PromptForm.joined))


def write_encoders(config: EncodersConfig, folder: Path) -> None:
    """Writes into a new folder what `read_encoders` found: embedded encoders whole, large ones by their path."""
    if config.text.kind is TextKind.embedded:
        assert config.text.path is not None  # `find_encoders` says where they lie
        shutil.copytree(config.text.path, folder)
    else:
        folder.mkdir()
        _write_config(config, folder)


def _read_config(folder: Path) -> EncodersConfig:
    record = read_json(folder / FILE)
    try:
        kinds = CodecKind(record["codec"]["kind"]), TextKind(record["text"]["kind"])
        codec = CodecConfig(**CODEC.translated(record["codec"]) | {"kind": kinds[0]})
        text = TextConfig(**TEXT.translated(record["text"]) | {"kind": kinds[1]})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / FILE} names no encoders of this version ({error}): prepare the films anew, and train on those"
        ) from None
    return EncodersConfig(codec, replace(text, path=str(folder)) if text.kind is TextKind.embedded else text)


def _write_config(config: EncodersConfig, folder: Path) -> None:
    (folder / FILE).write_text(json.dumps(asdict(config), indent=2) + "\n")
