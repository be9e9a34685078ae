"""This is the multi-shot model written out from its weights, without a thought for speed: one sample, dense
attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.mmdit import MMDiT


def velocity(model: MMDiT, latents: list[Tensor], sigma: list[float], text: list[Tensor]) -> list[Tensor]:
    """Returns the velocity of each shot of a story; text: the global caption's, then each shot's. Patches of one
    frame."""
    weights, config = model.state_dict(), model.config
    heads, theta = config.num_heads, config.rope_theta

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def embed(level: float) -> Tensor:
        angles = 1000 * level * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return torch.cat([angles.cos(), angles.sin()])

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift

    def norm(x: Tensor, name: str) -> Tensor:
        x = x.unflatten(-1, (heads, -1))
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    def rotate(x: Tensor, position: Tensor) -> Tensor:
        """x [L, heads, D]; position [L, 3]: a third of the channels for each of time, height and width."""
        pairs = x.shape[-1] // 6
        angles = (position[:, :, None] * theta ** (-torch.arange(pairs) / pairs)).flatten(1)
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(
            torch.ones_like(angles), angles
        ).unsqueeze(1)
        return torch.view_as_real(turned).flatten(-2)

    # Segments of the stream hold kind, shot (-1 is the global text), tokens and positions, for text on the diagonal.
    segments, start = [], 0
    for shot, caption in enumerate(text, start=-1):
        diagonal = torch.arange(start, start + len(caption))[:, None].expand(-1, 3)
        segments.append(["text", shot, linear(caption, "text_in"), diagonal])
        start += len(caption)
        if shot >= 0:
            patches = latents[shot].unfold(2, 2, 2).unfold(3, 2, 2)  # shape C T H W 2 2
            frames, height, width = grid = patches.shape[1:4]
            tokens = linear(patches.permute(1, 2, 3, 0, 4, 5).reshape(frames * height * width, -1), "video_in")
            if config.frame_place:
                rows, columns = (
                    torch.cos(math.pi * (torch.arange(n)[:, None] + 0.5) / n * torch.arange(8)) for n in (height, width)
                )
                plane = (rows[:, None, :, None] * columns[None, :, None, :]).reshape(height * width, 64)
                tokens = tokens + linear(plane.repeat(frames, 1), "place.linear")
            segments.append(["video", shot, tokens, start + torch.cartesian_prod(*map(torch.arange, grid))])
            start += max(grid)

    conditions = [
        linear(F.silu(linear(embed(level), "condition.time.linear_1")), "condition.time.linear_2")
        + linear(F.silu(linear(caption.mean(0), "condition.caption.0")), "condition.caption.2")
        for level, caption in zip([0.0, *sigma], text, strict=True)
    ]
    for layer in range(config.num_layers):
        queries, keys, values, modulations = [], [], [], []
        for kind, shot, x, position in segments:
            name = f"blocks.{layer}.{kind}"
            vectors = linear(F.silu(conditions[shot + 1]), f"{name}.modulation.linear").split(config.dim)
            q, k, v = linear(modulated(x, *vectors[:2]), f"{name}.to_qkv").split(config.dim, dim=-1)
            queries.append(rotate(norm(q, f"{name}.norm_q"), position))
            keys.append(rotate(norm(k, f"{name}.norm_k"), position))
            values.append(v.unflatten(-1, (heads, -1)))
            modulations.append(vectors)
        scores = torch.einsum("qnd,knd->nqk", torch.cat(queries), torch.cat(keys)) / (config.dim // heads) ** 0.5
        attended = torch.einsum("nqk,knd->qnd", scores.softmax(-1), torch.cat(values)).flatten(1)
        for segment, own, vectors in zip(
            segments, attended.split([len(x) for _, _, x, _ in segments]), modulations, strict=True
        ):
            name = f"blocks.{layer}.{segment[0]}"
            if len(vectors) == 6:  # the last layer's text has fewer vectors and ends here
                _, _, gate, shift, scale, ffn_gate = vectors
                x = segment[2] + gate * linear(own, f"{name}.to_out")
                hidden = F.gelu(linear(modulated(x, shift, scale), f"{name}.ffn.0"), approximate="tanh")
                segment[2] = x + ffn_gate * linear(hidden, f"{name}.ffn.2")

    velocities = []
    for kind, shot, x, _ in segments:
        if kind == "video":
            condition, latent = conditions[shot + 1], latents[shot]
            shift, scale = linear(F.silu(condition), "output.modulation.linear").split(config.dim)
            tokens = linear(modulated(x, shift, scale), "output.linear")
            channels, frames, height, width = latent.shape
            pieces = tokens.reshape(frames, height // 2, width // 2, channels, 2, 2).permute(3, 0, 1, 4, 2, 5)
            velocity = pieces.reshape(latent.shape)
            if config.input_skip:
                gain = linear(condition, "output.gain").reshape(channels, 1, 1, 2, 1, 2)
                pieces = latent.reshape(channels, frames, height // 2, 2, width // 2, 2)
                velocity = velocity + (gain * pieces).reshape(latent.shape)
            velocities.append(velocity)
    return velocities
