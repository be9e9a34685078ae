"""This module computes the features by which pictures are compared: those of DINO or CLIP from local weights, else a
histogram of colours.

The histogram is the best that could be had without a download: on Big Buck Bunny it tells pairs of shots that show one
character from pairs that show different ones with an area under the curve of 0.68 (TransNetV2's inner features: 0.65 at
most, small pictures: 0.52). It sees a palette, not an identity, and its numbers compare with nobody else's.

Shape letters: n pictures, D features.
"""

from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moc.errors import UserError
from moc.training.checkpoint import check_indexes, read_json

_BINS = (12, 4, 4)  # of hue, saturation and value
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Features(Protocol):
    """Features describe pictures as vectors, whose products are similarities. name: what a report calls them.
    is_published: whether others measure with the same."""

    name: str
    is_published: bool

    def images(self, pictures: np.ndarray) -> Tensor:
        """Returns features of pictures uint8 [n, h, w, 3]: fp32 [n, D] of length 1, on the CPU."""
        ...


class ColourHistogram:
    """These are the square roots of a histogram of hue, saturation and value (OpenCV): products are Bhattacharyya's."""

    name, is_published = "colour histogram", False

    def images(self, pictures: np.ndarray) -> Tensor:
        rows = []
        for picture in pictures:
            hsv = cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)
            rows.append(cv2.calcHist([hsv], [0, 1, 2], None, _BINS, [0, 180, 0, 256, 0, 256]).ravel())
        return F.normalize(torch.from_numpy(np.sqrt(np.stack(rows))), dim=1)


class Dino:
    """These features are the class token of a DINO or DINOv2 from a local folder."""

    is_published = True

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoModel  # seconds to import

        self.model = _load(AutoModel, path).to(device).eval()
        self.size, self.mean, self.deviation = _preparation(path)
        self.name, self.device = f"DINO ({Path(path).name})", device

    @torch.inference_mode()
    def images(self, pictures: np.ndarray) -> Tensor:
        pixels = _pixels(pictures, self.size, self.mean, self.deviation).to(self.device)
        return F.normalize(self.model(pixel_values=pixels).last_hidden_state[:, 0].float(), dim=1).cpu()


class Clip:
    """These features are those of pictures and texts in the joint space of a CLIP from a local folder."""

    is_published = True

    def __init__(self, path: str, device: torch.device) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = _load(CLIPModel, path).to(device).eval()
        self.tokenizer = _load(AutoTokenizer, path)
        self.size, self.mean, self.deviation = _preparation(path)
        self.name, self.device = f"CLIP ({Path(path).name})", device

    @torch.inference_mode()
    def images(self, pictures: np.ndarray) -> Tensor:
        pixels = _pixels(pictures, self.size, self.mean, self.deviation).to(self.device)
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        return F.normalize(seen.float(), dim=1).cpu()

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Returns features of texts, cut off at the model's length: fp32 [n, D] of length 1, on the CPU."""
        longest = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=longest, return_tensors="pt")
        said = self.model.text_model(
            input_ids=tokens["input_ids"].to(self.device), attention_mask=tokens["attention_mask"].to(self.device)
        )
        return F.normalize(self.model.text_projection(said.pooler_output).float(), dim=1).cpu()


def _load(kind: Any, path: str) -> Any:
    """Returns what transformers finds in a local folder; raises UserError where it finds none."""
    if not Path(path).is_dir():
        raise UserError(f"{path} is no folder with weights; give a local one, such as a clone of a model's repository")
    check_indexes(Path(path))
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} holds no model that transformers loads: {error}; clone its repository again") from None


def _preparation(path: str) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
    """Returns size, mean and deviation of the pictures that a model learned from; by default ImageNet's."""
    file = Path(path, "preprocessor_config.json")
    record = read_json(file) if file.is_file() else {}
    size = record.get("crop_size") or record.get("size") or 224
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge") or 224
    return int(size), tuple(record.get("image_mean", _MEAN)), tuple(record.get("image_std", _DEVIATION))


def _pixels(pictures: np.ndarray, size: int, mean: tuple[float, ...], deviation: tuple[float, ...]) -> Tensor:
    """Returns pictures uint8 [n, h, w, 3] as a square [n, 3, size, size] from their middle, normalized."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    scale = size / min(pixels.shape[2:])
    whole = [max(size, round(side * scale)) for side in pixels.shape[2:]]
    pixels = F.interpolate(pixels, whole, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = ((side - size) // 2 for side in whole)
    pixels = pixels[:, :, top : top + size, left : left + size]
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
