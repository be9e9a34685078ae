"""Text encoders: captions to features, behind one interface.

- `EmbeddedTextEncoder`: a small seeded T5 with a word-piece tokenizer made from a word list, for runs without download
- `T5TextEncoder`: T5 or UMT5 from a local folder, with Wan's text cleaning, 512 tokens at most

`encode(global_caption, shot_captions)` returns a list of 1 + S features [T_i, text_dim]: the global caption's, then
each shot's. An absent caption is "", which has null features of its own, one row or more.
"""

import hashlib
import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

END, UNKNOWN = "</s>", "[UNK]"
CHARACTERS = [chr(code) for code in range(33, 127) if not chr(code).isupper()] + list("–—…")


class TextKind(StrEnum):
    embedded = "embedded"
    t5 = "t5"


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder. `path`: embedded: a folder written by `save`, or a word list (one word a line), or "" for
    storyworld's own list given at build; t5: a folder with a T5 or UMT5 encoder and its tokenizer.

    whole_prompt: encode all captions as one prompt and cut the features by span (Wan), not each caption apart.
    dim, num_layers, seed: of the embedded encoder. max_tokens: longest prompt.
    """

    kind: TextKind = TextKind.embedded
    path: str = ""
    whole_prompt: bool = False
    dim: int = 128
    num_layers: int = 2
    seed: int = 0
    max_tokens: int = 512


class TextEncoder(nn.Module):
    """What data, trainer and sampler rely on."""

    text_dim: int
    fingerprint: str

    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        """Features of the global caption and of each shot's: 1 + S tensors [T_i, text_dim]."""
        raise NotImplementedError


# The embedded encoder


class EmbeddedTextEncoder(TextEncoder):
    """A T5 encoder with fixed random weights: its features keep the identity and order of words, and mean no more.

    vocabulary: words that become one token each; any other English text is spelled in characters.
    """

    def __init__(self, vocabulary: Iterable[str], config: TextConfig | None = None) -> None:
        super().__init__()
        self.config = config or TextConfig()
        self.vocabulary = sorted({word.lower() for word in vocabulary if word.strip()})
        self.tokenizer = word_piece_tokenizer(self.vocabulary)
        self.text_dim = dim = self.config.dim
        self.model = T5EncoderModel(
            T5Config(
                vocab_size=self.tokenizer.get_vocab_size(),
                d_model=dim,
                d_kv=dim // 4,
                d_ff=2 * dim,
                num_layers=self.config.num_layers,
                num_heads=4,
                dropout_rate=0.0,
            )
        )
        seed_weights(self.model, self.config.seed)
        self.eval().requires_grad_(False)
        digest = hashlib.sha256("\n".join(self.vocabulary).encode())
        for weight in self.model.parameters():
            digest.update(weight.numpy().tobytes())
        self.fingerprint = f"embedded-{digest.hexdigest()[:16]}"

    @torch.no_grad()
    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        return [self.encode_caption(caption) for caption in (global_caption, *shot_captions)]

    def encode_caption(self, caption: str) -> Tensor:
        """fp32 [T, text_dim]; the last row is the end of the text, and "" has that row alone."""
        ids = self.tokenizer.encode(clean(caption)).ids
        ids = torch.tensor([[*ids[: self.config.max_tokens - 1], self.tokenizer.token_to_id(END)]])
        return self.model(ids.to(self.model.device)).last_hidden_state[0]

    def save(self, folder: str | Path) -> None:
        """Writes what `load` needs: settings and word list; the weights follow from the seed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: asdict(self.config)[key] for key in ("dim", "num_layers", "seed", "max_tokens")}
        record = {**settings, "fingerprint": self.fingerprint}
        (folder / "text_encoder.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "vocabulary.txt").write_text("\n".join(self.vocabulary) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddedTextEncoder":
        """The encoder that `save` wrote; raises ValueError if its weights do not come out the same here."""
        record = json.loads(Path(folder, "text_encoder.json").read_text())
        fingerprint = record.pop("fingerprint")
        words = Path(folder, "vocabulary.txt").read_text().split()
        encoder = cls(words, TextConfig(**record))
        if encoder.fingerprint != fingerprint:
            raise ValueError(
                f"{folder}: the text encoder built here is {encoder.fingerprint}, the saved one {fingerprint}; "
                "this torch draws other random weights: use the version the model was trained with"
            )
        return encoder


def word_piece_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Lower-case word pieces: the given words whole, any other word by its characters."""
    pieces = [UNKNOWN, END, *CHARACTERS, *(f"##{c}" for c in CHARACTERS)]
    pieces += [word for word in words if word not in set(pieces)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNKNOWN, max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


@torch.no_grad()
def seed_weights(model: nn.Module, seed: int) -> None:
    """Draws every weight from one generator: embeddings of unit variance, so that words stay themselves, and layers
    that add a little of the other words to each."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        elif "shared" in name or "embed_tokens" in name:
            weight.normal_(0.0, 1.0, generator=generator)
        else:
            weight.normal_(0.0, 0.5 * weight.shape[1] ** -0.5, generator=generator)


# T5 and UMT5


def clean(text: str) -> str:
    """Wan's text cleaning: mend broken Unicode, undo HTML escapes, join white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def build_text_encoder(config: TextConfig, vocabulary: Iterable[str] = ()) -> TextEncoder:
    """The text encoder a configuration names. vocabulary: words of the embedded encoder where `path` is empty."""
    path = Path(config.path)
    if config.kind is TextKind.embedded:
        if not config.path:
            return EmbeddedTextEncoder(vocabulary, config)
        if path.is_dir():
            return EmbeddedTextEncoder.load(path)
        return EmbeddedTextEncoder(path.read_text().split(), config)
    raise NotImplementedError
