"""Films a prompt script: `python sample.py checkpoint=PATH script=FILE out=DIR key=value ...`.

Writes to DIR, each as soon as it is known: latents/NN.safetensors, shots/NN.mp4, then video.mp4, metadata.json with
everything to repeat it, storyboard.png and routing.png. A command that was killed goes on where it was.
"""

from configs.command import command
from configs.schema import SampleConfig
from film.filmmaker import Filmmaker
from film.folder import FilmFolder


@command("sample", SampleConfig)
def main(config: SampleConfig) -> None:
    """Loads model and script, films shot by shot, and tells what to look at."""
    folder, filmmaker = FilmFolder(config.out), Filmmaker(config)
    script = filmmaker.read(config.script, config.size, config.fps)
    filmmaker.make(script, folder, config.redo)
    print(*folder.files(), sep="\n")


if __name__ == "__main__":
    main()
