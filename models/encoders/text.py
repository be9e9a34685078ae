"""Text encoders turn captions into features, behind one interface.

- `EmbeddedTextEncoder` is a small seeded T5 with word pieces made from a word list, for runs without download
- `T5TextEncoder` is T5 or UMT5 from a local folder, with Wan's text cleaning, 512 tokens at most

`encode(global_caption, shot_captions)` returns a list of 1 + S features [T_i, text_dim]: the global caption's, then
each shot's. An absent caption is "", which has null features of its own; a prompt of all captions leaves it out.
"""

import html
import json
import logging
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING

import ftfy
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

from moc.batch import each_shape
from moc.errors import UserError, check_least
from moc.move import move
from moc.training.checkpoint import read_json, remedy
from models.checkpoints.strict import load_folder
from models.checkpoints.tensors import download_hint
from models.encoders.fingerprint import fingerprint, weights_digest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

END, UNKNOWN = "</s>", "[UNK]"
CHARACTERS = [chr(code) for code in range(33, 127) if not chr(code).isupper()] + list("–—…")
PUNCTUATION = [character for character in CHARACTERS if not character.isalnum()]


class TextKind(StrEnum):
    """This setting says what encodes captions: the embedded encoder, small and seeded, or a T5 with weights."""

    embedded = "embedded"
    t5 = "t5"


class PromptForm(StrEnum):
    """The form says how captions become prompts. separate: each is encoded apart. windowed: each shot's is encoded
    with the global one before it, which has features of its own only where there is no shot. The others encode all
    captions as one prompt and cut its features by span: joined: captions one after another (Wan); holocine: with that
    model's tags and shot count."""

    separate = "separate"
    windowed = "windowed"
    joined = "joined"
    holocine = "holocine"


@dataclass(frozen=True)
class TextConfig:
    """These settings name a text encoder and describe it.

    kind: `embedded`, which needs no download, or `t5`.
    path: for embedded a folder written by `save`, a word list (one word a line), or null for the words given at build;
    for t5 a folder with a T5 or UMT5 encoder and its tokenizer.
    form: for t5 only: how captions become a prompt; see `PromptForm`.
    dim, num_layers, seed: the sizes and the seed of the embedded encoder.
    max_tokens: the length of the longest prompt.
    """

    kind: TextKind = TextKind.embedded
    path: str | None = None
    form: PromptForm = PromptForm.separate
    dim: int = 128
    num_layers: int = 2
    seed: int = 0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        check_least(self, "text", 4, "dim")  # each of four heads has a channel or more
        check_least(self, "text", 1, "num_layers", "max_tokens")
        check_least(self, "text", 0, "seed")


class TextEncoder(nn.Module):
    """This is the interface that data, trainer and sampler rely on."""

    text_dim: int
    fingerprint: str

    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        """Returns features of the global caption and of each shot's: 1 + S tensors [T_i, text_dim]."""
        raise NotImplementedError

    def encode_windows(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        """Returns the same for a model whose shots see the global caption and their own alone: no caption counts in the
        features of another shot, and no number of shots makes a prompt too long."""
        return self.encode(global_caption, shot_captions)

    def encode_each(self, captions: Sequence[str]) -> list[Tensor]:
        """Returns features [T_i, text_dim] of captions that stand alone, each as `encode(caption, [])[0]` gives it, to
        rounding."""
        return [self.encode(caption, [])[0] for caption in captions]

    def unknown_words(self, captions: Iterable[str]) -> list[str]:
        """Returns the words of captions that mean nothing to this encoder, each once, in order: to T5 none are such."""
        return []


# The embedded encoder


class EmbeddedTextEncoder(TextEncoder):
    """This is a T5 encoder with fixed random weights: its features keep identity and order of words, and mean no more.

    vocabulary: words that become one token each; any other English text is spelled in characters.
    """

    def __init__(self, vocabulary: Iterable[str], config: TextConfig | None = None) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel  # takes seconds to import

        self.config = config or TextConfig()
        self.vocabulary = sorted({word.lower() for word in vocabulary if word.strip()})
        self.tokenizer = word_piece_tokenizer(self.vocabulary)
        self.text_dim = dim = self.config.dim
        with torch.random.fork_rng(devices=[]):  # leaves the caller's random state alone
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
        self.fingerprint = fingerprint("embedded", self.vocabulary, weights_digest(self.model))

    @torch.no_grad()
    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        return [self.encode_caption(caption) for caption in (global_caption, *shot_captions)]

    def encode_caption(self, caption: str) -> Tensor:
        """Returns fp32 [T, text_dim]; the last row is the end of the text, and "" has that row alone."""
        return self._features(self._ids(caption)[None])[0]

    @torch.no_grad()
    def encode_each(self, captions: Sequence[str]) -> list[Tensor]:
        """Encodes captions, those of one length at once."""
        return list(each_shape(self._features, [self._ids(caption) for caption in captions]))

    def unknown_words(self, captions: Iterable[str]) -> list[str]:
        """Returns words that are spelled in characters, or have characters that no token stands for."""
        known, found = {*self.vocabulary, *PUNCTUATION}, dict[str, None]()
        for caption in captions:
            words = self.tokenizer.pre_tokenizer.pre_tokenize_str(
                self.tokenizer.normalizer.normalize_str(clean(caption))
            )
            found |= dict.fromkeys(word for word, _ in words if word not in known)
        return list(found)

    def _ids(self, caption: str) -> Tensor:
        ids = self.tokenizer.encode(clean(caption)).ids
        if len(ids) >= self.config.max_tokens:
            logger.warning(
                "a caption of %d tokens is cut after %d, which are all that the model sees of it (%r...)",
                *(len(ids), self.config.max_tokens - 1, caption[:60]),
            )
        return torch.tensor([*ids[: self.config.max_tokens - 1], self.tokenizer.token_to_id(END)])

    def _features(self, ids: Tensor) -> Tensor:
        """Returns the features of ids, int64 [B, T] on the CPU."""
        with torch.autocast(self.model.device.type, enabled=False):
            return self.model(move(ids, self.model.device)).last_hidden_state

    def save(self, folder: str | Path) -> None:
        """Writes what `load` needs: settings and word list; the weights follow from the seed."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {key: asdict(self.config)[key] for key in ("dim", "num_layers", "seed", "max_tokens")}
        record = {**settings, "fingerprint": self.fingerprint}
        (folder / "text_encoder.json").write_text(json.dumps(record, indent=2) + "\n")
        (folder / "vocabulary.txt").write_text("\n".join(self.vocabulary) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "EmbeddedTextEncoder":
        """Returns the encoder that `save` wrote; raises UserError if its weights do not come out the same here."""
        file, vocabulary = Path(folder, "text_encoder.json"), Path(folder, "vocabulary.txt")
        if not (file.is_file() and vocabulary.is_file()):
            raise UserError(f"{folder} holds no text encoder ({file.name}, {vocabulary.name}): name one that was saved")
        record = read_json(file)
        fingerprint = record.pop("fingerprint", None)
        try:
            encoder = cls(_words(vocabulary), TextConfig(**record))
        except TypeError as error:
            raise UserError(f"{file} does not describe a text encoder: {error}; make the folder again") from None
        if encoder.fingerprint != fingerprint:
            raise UserError(
                f"{folder}: the text encoder built here is {encoder.fingerprint}, the saved one {fingerprint}; "
                "this torch draws other random weights: use the version the model was trained with"
            )
        return encoder


def word_piece_tokenizer(words: Sequence[str]) -> Tokenizer:
    """Returns a tokenizer of lower-case word pieces: the given words whole, any other word by its characters."""
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

T5_CLASSES = {"t5": "T5", "umt5": "UMT5"}  # prefixes of transformers' classes, such as T5EncoderModel
TIED = ("encoder.embed_tokens.weight", "shared.weight")  # files hold one of them, or both
DECODER = ("decoder.", "lm_head.")  # a whole T5 has these too; only its encoder is read


def clean(text: str) -> str:
    """Cleans text as Wan does: it mends broken Unicode, undoes HTML escapes and joins white space."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def join_prompt(form: PromptForm, global_caption: str, shot_captions: Sequence[str]) -> tuple[str, list[int]]:
    """Returns one prompt of all captions, and the character at which each starts (global, shot 1, ...). Without any
    shot caption it is the global one as it is."""
    captions = [clean(caption) for caption in (global_caption, *shot_captions)]
    if form == PromptForm.holocine and len(shot_captions) > 1 and any(captions[1:]):
        tags = ["[per shot caption]", *["[shot cut]"] * (len(shot_captions) - 1)]
        story = f"[global caption] {captions[0]} This scene contains {len(shot_captions)} shots."
        captions = [story, *(f"{tag} {caption}" for tag, caption in zip(tags, captions[1:], strict=True))]
    starts, end = [], 0
    for caption in captions:
        starts.append(end)
        end += len(caption) + 1 if caption else 0
    return " ".join(caption for caption in captions if caption), starts


class T5TextEncoder(TextEncoder):
    """This encoder runs T5 or UMT5 in bf16 from a folder: the model and its tokenizer, or Wan's `text_encoder/`,
    `tokenizer/`.

    Features of padding are not returned: Wan's transformer adds its zero rows itself.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        if config.path is None:
            raise UserError("text.kind=t5 needs text.path=FOLDER, of a T5 or UMT5 encoder and its tokenizer")
        folder = Path(config.path)
        is_pipeline = (folder / "text_encoder").is_dir()
        model_folder = folder / "text_encoder" if is_pipeline else folder
        if not (model_folder / "config.json").is_file():
            raise UserError(
                f"text.path={config.path!r} is not a folder of a T5 or UMT5 encoder (no config.json)"
                f"{download_hint(config.path)}"
            )
        settings = read_json(model_folder / "config.json")
        kind = settings.get("model_type")
        if kind not in T5_CLASSES:
            raise UserError(
                f"{model_folder} holds a {kind!r} model; the text encoder must be one of {list(T5_CLASSES)}"
            )
        import transformers  # takes seconds to import

        model, model_config = (getattr(transformers, T5_CLASSES[kind] + name) for name in ("EncoderModel", "Config"))
        self.model = load_folder(
            model_folder, lambda: model(model_config.from_dict(settings)), torch.bfloat16, tied=TIED, ignored=DECODER
        )
        self.model.set_input_embeddings(self.model.encoder.embed_tokens)  # keeps it once in memory, on every device
        self.tokenizer = load_tokenizer(folder / "tokenizer" if is_pipeline else folder)
        self.text_dim = self.model.config.d_model
        self.eval().requires_grad_(False)
        vocabulary = sorted(self.tokenizer.get_vocab().items())  # sorted, since its order differs each time
        self.fingerprint = fingerprint(
            kind, str(config.form), config.max_tokens, vocabulary, weights_digest(self.model)
        )

    @torch.no_grad()
    def encode(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        if self.config.form == PromptForm.separate:
            return [self._features(clean(caption))[0] for caption in (global_caption, *shot_captions)]
        if self.config.form == PromptForm.windowed:
            return self._encode_windows(global_caption, shot_captions)
        prompt, starts = join_prompt(self.config.form, global_caption, shot_captions)
        features, offsets = self._features(prompt)
        # A piece may begin with the space before its word; the end of the text goes with the last caption, or, where no
        # shot has one (a negative prompt), with the global one, which all shots see.
        owner = [bisect_right(starts, offset + 1) - 1 for offset in offsets[:-1]]
        owner.append(max(owner, default=0))
        return list(features.split([owner.count(index) for index in range(len(starts))]))

    def encode_windows(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        """Keeps to one prompt with HoloCine's weights, which know their own form alone."""
        if self.config.form == PromptForm.joined:
            return self._encode_windows(global_caption, shot_captions)
        return self.encode(global_caption, shot_captions)

    @torch.no_grad()
    def _encode_windows(self, global_caption: str, shot_captions: Sequence[str]) -> list[Tensor]:
        if not shot_captions:  # there is no window, and the global caption stands alone
            return [self._features(clean(global_caption))[0]]
        prompts = [join_prompt(PromptForm.joined, global_caption, [caption])[0] for caption in shot_captions]
        features = {prompt: self._features(prompt)[0] for prompt in dict.fromkeys(prompts)}
        none = next(iter(features.values()))[:0]
        return [none, *(features[prompt] for prompt in prompts)]

    def _features(self, prompt: str) -> tuple[Tensor, list[int]]:
        """Returns bf16 [T, text_dim] of a prompt with its end token, and the character at which each token starts."""
        tokens = self.tokenizer(prompt, return_offsets_mapping=True)
        if len(tokens.input_ids) > self.config.max_tokens:
            raise UserError(
                f"a prompt of {len(tokens.input_ids)} tokens is over the text encoder's {self.config.max_tokens}: "
                f"shorten its captions ({prompt[:60]!r}...), or let each shot see the global one and its own alone "
                "(moc.text_anchor=global_and_own), which are then a prompt each"
            )
        ids = torch.tensor([tokens.input_ids], device=self.model.device)
        with torch.autocast(ids.device.type, enabled=False):
            features = self.model(ids).last_hidden_state[0]
        return features, [start for start, _ in tokens.offset_mapping]


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Returns the tokenizer of a folder; raises UserError where transformers would make up an empty one, or name no
    file."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "spiece.model")):
        raise UserError(f"{folder} holds no tokenizer (tokenizer.json or spiece.model): put the release's files there")
    for file in folder.glob("tokenizer*.json"):
        read_json(file)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the libraries raise several types of errors
        raise UserError(f"{folder} holds a tokenizer that does not load: {error}; fetch its files again") from None


def build_text_encoder(config: TextConfig, vocabulary: Iterable[str] = ()) -> TextEncoder:
    """Returns the text encoder a configuration names. vocabulary: words of the embedded encoder where `path` is
    null."""
    if config.kind == TextKind.t5:
        return T5TextEncoder(config)
    if config.path is None:
        return EmbeddedTextEncoder(vocabulary, config)
    path = Path(config.path)
    return EmbeddedTextEncoder.load(path) if path.is_dir() else EmbeddedTextEncoder(_words(path), config)


def _words(file: Path) -> list[str]:
    if not file.exists():
        raise UserError(f"text.path={str(file)!r} does not exist{download_hint(file)}")
    try:
        return file.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text ({error}); save it as UTF-8, or {remedy(file)}") from None
