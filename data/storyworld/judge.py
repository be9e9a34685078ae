"""Is a sampled film the story that was scripted? Judged from pixels alone."""

from dataclasses import dataclass
from pathlib import Path

from data.cuts import CutAccuracy, cut_accuracy
from data.scan import scan_video
from data.script import Script
from data.shots import ShotDetector
from data.storyworld.readers import name_place
from data.storyworld.story import place_of_caption
from data.video import open_video


@dataclass(frozen=True)
class Verdict:
    """places: (scripted, seen) of each shot. cuts: first frames of new shots, as scripted and as found."""

    places: list[tuple[str, str]]
    scripted_cuts: list[int]
    found_cuts: list[int]
    accuracy: CutAccuracy

    @property
    def places_right(self) -> int:
        return sum(scripted == seen for scripted, seen in self.places)


def judge_film(film: Path, script: Script, detector: ShotDetector) -> Verdict:
    """Reads `film/shots/NN.mp4` and `film/video.mp4`, as sample.py wrote them for `script`."""
    places, cuts, num_frames = [], [], 0
    for number, shot in enumerate(script.shots, start=1):
        reader = open_video(film / f"shots/{number:02d}.mp4")
        places.append((place_of_caption(shot.prompt), name_place(reader.read(0, reader.num_frames).numpy())))
        if number > 1 and shot.cut:
            cuts.append(num_frames)
        num_frames += reader.num_frames
        reader.close()
    spans = scan_video(film, "video.mp4", film / "scans", detector).spans or ()
    found = [start for start, _ in spans[1:]]
    return Verdict(places, cuts, found, cut_accuracy(found, cuts, num_frames))
