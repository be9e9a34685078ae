"""The pair that stands between pixels, words and the transformer: a codec and a text encoder, kept together.

A prepared folder and every checkpoint hold them as `encoders/`, so that whoever has the latents or the model can decode
and prompt with just what made them. Embedded encoders are stored whole; large ones by the path they were loaded from.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from models.codec import Codec, CodecConfig, CodecKind
from models.text import EmbeddedTextEncoder, TextConfig, TextEncoder, TextKind, build_text_encoder
from models.vae import build_codec


@dataclass(frozen=True)
class EncodersConfig:
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)


@dataclass(frozen=True)
class Encoders:
    """What `build_encoders` and `load_encoders` give."""

    config: EncodersConfig
    codec: Codec
    text: TextEncoder

    def save(self, folder: str | Path) -> None:
        """Writes what `load_encoders` needs into `folder`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "encoders.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
        if isinstance(self.text, EmbeddedTextEncoder):
            self.text.save(folder)


def build_encoders(config: EncodersConfig, vocabulary: Iterable[str] = ()) -> Encoders:
    """Codec and text encoder of a configuration; `vocabulary` is for an embedded text encoder without a path."""
    return Encoders(config, build_codec(config.codec), build_text_encoder(config.text, vocabulary))


def load_encoders(folder: str | Path) -> Encoders:
    """The encoders that `Encoders.save` wrote; raises ValueError where there are none or they come out different."""
    folder = Path(folder)
    if not (folder / "encoders.json").is_file():
        raise ValueError(f"{folder} holds no encoders (encoders.json): give a folder made by prepare_data or train.py")
    record = json.loads((folder / "encoders.json").read_text())
    codec = CodecConfig(**record["codec"] | {"kind": CodecKind(record["codec"]["kind"])})
    text = TextConfig(**record["text"] | {"kind": TextKind(record["text"]["kind"])})
    if text.kind is TextKind.embedded:
        text = replace(text, path=str(folder))
    return build_encoders(EncodersConfig(codec, text))
