"""Films a prompt script: `python sample.py checkpoint=PATH script=FILE out=DIR key=value ...`.

It writes to DIR, each as soon as it is known: latents/NN.safetensors, shots/NN.mp4, then video.mp4, metadata.json with
everything to repeat it, storyboard.png and routing.png. A command that was killed goes on where it was. script=FOLDER
films each script in it, to DIR/NAME; dry_run=true tells what the films will cost, and makes none. `accelerate launch
sample.py` deals the scripts to its processes, or with parallel.sequence=N has N of them make each film together.
"""

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from configs.schema import SampleConfig
from film.filmmaker import Filmmaker
from film.find import find_films, read_films, tell_costs
from moc.errors import Refusals


@command("sample", SampleConfig)
def main(config: SampleConfig) -> None:
    """Loads model and scripts, films shot by shot, and tells what to look at."""
    filmmaker, refusals = Filmmaker(config), Refusals()
    found = find_films(config.script, config.out, refusals)
    films = read_films(found, filmmaker, refusals, config.size, config.fps)
    is_main = filmmaker.parallel.is_main
    if config.dry_run and is_main:
        tell_costs(films, filmmaker, refusals, config.redo)
    refusals.tell()
    if config.dry_run:
        return
    filmmaker.make(films, config.redo)
    for _, folder in films if is_main else ():
        print(*folder.files(), sep="\n")


if __name__ == "__main__":
    main()
