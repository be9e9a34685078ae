"""This module reads still images as videos of one frame."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from data.errors import FETCH_AGAIN, DataError


def read_image(path: Path) -> Tensor:
    """Returns uint8 [1, H, W, 3] RGB, upright as its EXIF says. Raises DataError (zero-byte, not-an-image)."""
    if path.stat().st_size == 0:
        raise DataError("zero-byte", path, f"the file is empty (0 bytes); {FETCH_AGAIN}")
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would cut off at 255
                upright = Image.fromarray((np.array(upright) >> 8).astype(np.uint8))
            rgb = np.array(upright.convert("RGB"))
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error and others for broken files
        raise DataError("not-an-image", path, f"cannot be read as an image ({error}); {FETCH_AGAIN}") from error
    return torch.from_numpy(rgb).unsqueeze(0)
