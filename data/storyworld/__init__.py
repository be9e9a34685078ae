"""Storyworld is a procedural world of multi-shot stories with exact ground truth. Its modules hold:

config         the settings
canvas         antialiased shapes, gradients, soft edges
props          trees, rocks, houses ...
places         the eight places: palette, texture, props, light
animals        the eight animals: ears, faces, tails
accessories    hat, scarf, crown ...
characters     badge, look and pose of a character, and its drawing
motion         actions and camera moves as functions of time
scenes         plans of scenes, captions, vocabulary
render         frames, boxes, visible shares
readers        names a place or a character's colours from pixels alone
world_files    videos, manifest.jsonl, truth.jsonl
recall_scenes  recall scenes by the thousand, as numbers
stock          what recall scenes show, painted once, and their shots composed on any device
filmed         the same for shots with moving cameras
"""

from data.storyworld.config import Mode, StoryworldConfig
from data.storyworld.readers import name_looks, name_place
from data.storyworld.scenes import place_of_caption, vocabulary
from data.storyworld.world_files import generate

__all__ = ["Mode", "StoryworldConfig", "generate", "name_looks", "name_place", "place_of_caption", "vocabulary"]
