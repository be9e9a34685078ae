"""This module captions samples that have no captions, by a local vision-language model.

A sample gets a global caption "[character] ... [environment] ... [story] ...", in which each character has an ID
(character1, ...), then a caption for each shot that calls them by it. The first sentence is kept as a shorter length.
Answers are kept in files, so that a restarted run asks for no sample twice.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from data.errors import DataError
from data.manifest import Caption, captions, check_caption
from data.media.decode import open_video
from data.media.images import read_image
from data.prepare.planning import SamplePlan, replan
from data.records import digest, read_record, write_record

TAGS = ("[character]", "[environment]", "[story]")
_FRAMES_OF_SHOT = 4
_TRIES = 2
_GLOBAL_QUESTION = (
    "These are frames of one film scene, in order, {frames} for each of {shots} shots. Answer in exactly this form and "
    "nothing else: [character] every character that matters, each as character1, character2, ... with lasting looks: "
    "kind, build, hair or fur, clothes, colours. [environment] the place, the light, the style of the pictures. "
    "[story] what happens from first to last shot, calling the characters by those names."
)
_SHOT_QUESTION = (
    "These are frames of one shot, in order, of this scene: {scene}\nSay in one to three sentences what it shows: "
    "who, calling the characters character1, character2, ... as above, what they do, where, and how the camera frames "
    "and moves. Only what can be seen."
)


class Captioner(Protocol):
    """A captioner answers a question about pictures. name: the model's name, under which the answers are kept."""

    name: str

    def answer(self, pictures: Sequence[np.ndarray], question: str) -> str: ...


class TransformersCaptioner:
    """This captioner runs a vision-language model from a local folder, any that transformers loads as
    image-text-to-text."""

    def __init__(self, path: str, device: str = "cpu", max_new_tokens: int = 512) -> None:
        if not Path(path).is_dir():
            raise DataError("missing-captioner", path, "no such folder; give captioner=DIR of a local model")
        from transformers import AutoModelForImageTextToText, AutoProcessor  # seconds to import

        from moc.training.checkpoint import check_indexes

        check_indexes(Path(path))
        self.name = path
        self.max_new_tokens = max_new_tokens
        try:
            self.processor = AutoProcessor.from_pretrained(path, local_files_only=True)
            model: Any = AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype="auto")
        except (ImportError, OSError, ValueError) as error:  # such as a Qwen-VL processor, which needs torchvision
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                "missing-captioner", path, f"does not load as an image-text-to-text model ({reason}); give another"
            ) from error
        self.model = model.to(device).eval()

    @torch.inference_mode()
    def answer(self, pictures: Sequence[np.ndarray], question: str) -> str:
        """Returns the answer. pictures: uint8 [H, W, 3] each."""
        content: list[dict] = [{"type": "image", "image": Image.fromarray(picture)} for picture in pictures]
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device, dtype=self.model.dtype)  # only the pictures change dtype; token ids stay integers
        output = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = output[:, inputs["input_ids"].shape[1] :]
        return self.processor.batch_decode(answer, skip_special_tokens=True)[0].strip()


@dataclass(frozen=True)
class SampleCaptioner:
    """This object captions plans of videos under `root`, keeping the answers in `folder`."""

    captioner: Captioner
    root: Path
    folder: Path

    def wants(self, plan: SamplePlan) -> bool:
        """Returns whether neither the scene nor any shot has a caption."""
        given = [plan.scene.caption, *(shot.caption for shot in plan.scene.shots)]
        return not any(text.strip() for caption in given for text in captions(caption))

    def has(self, plan: SamplePlan) -> bool:
        """Returns whether the model was asked before."""
        return read_record(self._record(plan)) is not None

    def make(self, plan: SamplePlan) -> None:
        """Asks for a plan's captions. Raises DataError (bad-answer, and those of reading)."""
        shots = list(self._pictures(plan))
        few = [picture for pictures in shots for picture in pictures[:: max(1, len(pictures) // 2)][:2]]
        question = _GLOBAL_QUESTION.format(frames=len(few) // len(shots), shots=len(shots))
        whole = self._ask(plan, few, question, tagged=True)
        captions = [self._ask(plan, pictures, _SHOT_QUESTION.format(scene=whole)) for pictures in shots]
        write_record(self._record(plan), {"global": whole, "shots": captions})

    def apply(self, plan: SamplePlan) -> SamplePlan:
        """Returns the plan with its captions; as it is, if there are none for it."""
        answers = read_record(self._record(plan))
        if answers is None:
            return plan
        shots = tuple(
            replace(shot, caption=lengths(text)) for shot, text in zip(plan.scene.shots, answers["shots"], strict=False)
        )
        return replan(self.root, plan, replace(plan.scene, caption=answers["global"], shots=shots))

    def _ask(self, plan: SamplePlan, pictures: list[np.ndarray], question: str, tagged: bool = False) -> str:
        for _ in range(_TRIES):
            answer = str(check_caption(self.captioner.answer(pictures, question), plan.scene.id))
            if answer and (not tagged or has_tags(answer)):
                return answer
            question += f" Begin with {TAGS[0]}." if tagged else " Answer with at least one sentence."
        said = f"{self.captioner.name} did not answer in form: {answer[:80]!r}"
        raise DataError("bad-answer", plan.scene.id, f"{said}; caption it by hand, or take another captioner")

    def _pictures(self, plan: SamplePlan) -> Iterator[list[np.ndarray]]:
        """Yields a few frames of each shot, evenly spaced."""
        path = self.root / plan.scene.path
        if plan.index is None:
            yield list(read_image(path).numpy())
            return
        reader = open_video(path, index=plan.index)
        try:
            for indices in plan.indices:
                picked = np.linspace(0, len(indices) - 1, min(_FRAMES_OF_SHOT, len(indices))).round().astype(int)
                yield list(reader.pick([indices[number] for number in picked]).numpy())
        finally:
            reader.close()

    def _record(self, plan: SamplePlan) -> Path:
        return self.folder / f"{digest({'plan': plan.key, 'captioner': self.captioner.name})}.json"


def has_tags(text: str) -> bool:
    """Returns whether the three tags stand in it in order, each with something after it."""
    return re.search(r"\s*\S.*".join(re.escape(tag) for tag in TAGS) + r"\s*\S", text, re.DOTALL) is not None


def lengths(text: str) -> Caption:
    """Returns the first sentence, and the whole if it says more."""
    first = re.split(r"(?<=[.!?])\s", text, maxsplit=1)[0]
    return text if first == text else (first, text)
