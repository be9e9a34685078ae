"""These tests are about stills: what their pixels are, whatever form a file has."""

import numpy as np
import pytest
from PIL import Image

from data.media.images import read_image

GREY = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp"])
def test_a_grey_still_has_its_values_in_every_channel(suffix, tmp_path):
    Image.fromarray(GREY).save(tmp_path / f"still.{suffix}", lossless=True)
    pixels = read_image(tmp_path / f"still.{suffix}").numpy()
    assert (pixels.shape, pixels.dtype) == ((1, 6, 8, 3), np.uint8)
    assert np.array_equal(pixels[0], np.stack([GREY] * 3, axis=-1))


def test_a_still_of_16_bits_keeps_the_upper_eight(tmp_path):
    """Pillow's own conversion makes all that is over 255 white."""
    Image.fromarray(GREY.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.png")
    assert np.array_equal(read_image(tmp_path / "deep.png")[0, :, :, 0].numpy(), GREY)


def test_a_still_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a player turns it by a quarter to the right
    Image.fromarray(GREY).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png")[0, :, :, 0].numpy(), np.rot90(GREY, -1))
