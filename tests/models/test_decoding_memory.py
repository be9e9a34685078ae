"""These tests are about what decoding is counted to take, against the tensors that it holds."""

import pytest
import torch

from models.encoders.codec import CodecConfig, CodecKind
from models.encoders.pair import build_codec
from tests.codecs import HeldTensors, save_tiny_wan
from tests.models.test_vae import WAN21, WAN22

KINDS = {"lapped": {}, "wan 2.1": WAN21 | {"base_dim": 4}, "wan 2.2": WAN22 | {"decoder_base_dim": 4}}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)
def test_decoding_holds_as_much_as_is_counted(settings, tmp_path):
    """A GPU's convolutions need more besides, which is in the count of Wan's."""
    config = CodecConfig()
    if settings:
        config = CodecConfig(CodecKind.wan, str(save_tiny_wan(tmp_path, settings | {"num_res_blocks": 2})))
    codec, size = build_codec(config), (64, 96)
    frames = max(3, codec.latents_at_once)
    latent = torch.zeros(codec.latent_channels, frames, *(length // codec.spatial_factor for length in size))
    with HeldTensors() as held:
        for _ in codec.decode_stream(latent):
            pass
    assert 0.8 < held.most / codec.decoding_bytes(*size) < 1.1
