"""Tensors have two names: that of the Wan release and that of diffusers; this module translates them."""

import re

COMFYUI_PREFIX = "model.diffusion_model."

# Stems of the original release map to diffusers'; the rest of a name (".weight", ".bias") is shared.
TOP = {
    "patch_embedding": "patch_embedding",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
BLOCK = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{old}.{a}": f"{new}.{b}"
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    **{
        f"{old}.{norm}": f"{new}.{norm}"
        for old, new in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for norm in ("norm_q", "norm_k")
    },
}


def _rename(name: str, top: dict[str, str], block: dict[str, str]) -> str | None:
    match = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name)
    assert match is not None  # everything in the pattern is optional
    prefix, stem, suffix = match[1] or "", match[2], match[3] or ""
    new = (block if prefix else top).get(stem)
    return None if new is None else prefix + new + suffix


def to_diffusers_name(name: str) -> str | None:
    """Returns an original name, with ComfyUI's prefix or without, as diffusers'; None for one no Wan model has."""
    return _rename(name.removeprefix(COMFYUI_PREFIX), TOP, BLOCK)


def to_original_name(name: str) -> str | None:
    """Returns the inverse of `to_diffusers_name`."""
    return _rename(name, {new: old for old, new in TOP.items()}, {new: old for old, new in BLOCK.items()})
