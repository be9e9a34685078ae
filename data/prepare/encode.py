"""This module is the third stage of preparing: codec and text encoder encode frames and captions into the cache."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.cache.online import describe_frames
from data.cache.writer import NULL_GLOBAL, NULL_SHOT, CacheWriter, EncodedScene
from data.errors import DataError
from data.interfaces import Codec, TextEncoder
from data.manifest import captions, shot_prompt
from data.media.resize import read_shots
from data.prepare.planning import SamplePlan
from data.prepare.report import save_thumbnail


@dataclass(frozen=True)
class SampleEncoder:
    """This object encodes plans of videos under `root`, leaving a thumbnail of each shot in `output`."""

    codec: Codec
    text_encoder: TextEncoder
    root: Path
    output: Path
    decoder: str
    device: str
    online_in: Path | None = None  # the cache folder, where it is to hold no latents; else None

    def encode(self, plan: SamplePlan) -> EncodedScene:
        """Encodes the frames and captions of a plan. Raises DataError: out-of-memory, and those of reading, such as
        broken and size-change."""
        encode = self.codec.shot_encoder()
        latents = []
        try:
            for pieces in self._shots(plan):
                if self.online_in:
                    deque(pieces, maxlen=0)  # reads all frames, so that unreadable ones fail now and not in training
                else:
                    latents.append(encode(pieces))
        except torch.OutOfMemoryError as error:
            raise DataError(
                "out-of-memory", plan.scene.id, "a shot does not fit the GPU; lower size or max_frames"
            ) from error
        scene = plan.scene
        kind = "image" if scene.image else "single" if len(plan.indices) == 1 else "multi"
        cuts = [shot.cut for shot in scene.shots]
        encoded = EncodedScene(scene.id, plan.key, kind, latents, self._text(plan), cuts=cuts)
        if not self.online_in:
            return encoded
        shown = (plan.index, plan.indices, plan.size)
        frames = describe_frames(self.root, scene.path, self.decoder, *shown, self.online_in)
        return replace(encoded, shapes=_latent_shapes(plan, self.codec), frames=frames)

    def add_null_text(self, writer: CacheWriter) -> None:
        """Stores what stands for a dropped caption, global and of a shot: features of the empty one."""
        null_global, null_shot = self.text_encoder.encode("", [""])
        writer.add_text(null_global, "null caption", NULL_GLOBAL)
        writer.add_text(null_shot, "null caption", NULL_SHOT)

    def _shots(self, plan: SamplePlan) -> Iterator[Iterator[Tensor]]:
        """Yields the pieces of each shot, on the device; the middle frame of each is saved on its way."""
        path = self.root / plan.scene.path
        shots = read_shots(path, self.decoder, plan.index, plan.indices, plan.size)
        for i, pieces in enumerate(shots):
            yield self._with_thumbnail(plan, i, pieces)

    def _with_thumbnail(self, plan: SamplePlan, shot: int, pieces: Iterator[Tensor]) -> Iterator[Tensor]:
        until_middle = len(plan.indices[shot]) // 2
        for piece in pieces:
            if 0 <= until_middle < piece.shape[1]:
                save_thumbnail(self.output, plan, shot, piece[:, until_middle])
            until_middle -= piece.shape[1]
            yield piece.to(self.device)

    def _text(self, plan: SamplePlan) -> list[list[Tensor]]:
        """Returns features of each length of the captions; a caption with fewer lengths repeats its last."""
        whole = captions(plan.scene.caption)
        shots = [(captions(shot.caption), shot.cut) for shot in plan.scene.shots] or [(("",), False)]
        lengths = max(len(texts) for texts in [whole, *(texts for texts, _ in shots)])
        return [
            self.text_encoder.encode(
                _of_length(whole, n), [shot_prompt(_of_length(texts, n), cut) for texts, cut in shots]
            )
            for n in range(lengths)
        ]


def _latent_shapes(plan: SamplePlan, codec: Codec) -> list[list[int]]:
    """Returns [C, T, H, W] of each shot, before anything is encoded."""
    height, width = (side // codec.spatial_factor for side in plan.size)
    lengths = [codec.latent_frames(len(indices), shot) for shot, indices in enumerate(plan.indices)]
    return [[codec.latent_channels, length, height, width] for length in lengths]


def _of_length(texts: Sequence[str], n: int) -> str:
    return texts[min(n, len(texts) - 1)]
