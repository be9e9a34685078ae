"""Opens a storyboard in the browser: python scripts/app.py checkpoint=PATH folder=DIR [port=7860] [key=value ...]

There one writes, estimates and films scripts, makes single shots anew and compares takes, all in DIR. The page is
served to this machine alone. It needs gradio: pip install -e '.[app]'
"""

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    import configs.importing  # noqa: F401 (from here on Ctrl-C is one line)

from configs.command import command
from film.filmmaker import Filmmaker, FilmmakerConfig
from film.studio import Studio
from moc.errors import UserError


@dataclass
class AppConfig(FilmmakerConfig):
    """These settings say what the app films with, and where.

    folder: where scripts and films lie; nothing else is read or written.
    port: the page's, on this machine.
    preview_steps: the steps of a preview.
    sampler: how shots are sampled.
    """

    folder: str = field(kw_only=True)
    port: int = 7860
    preview_steps: int = 8


@command("app", AppConfig)
def main(config: AppConfig) -> None:
    os.environ |= {
        "GRADIO_TEMP_DIR": str(Path(config.folder).resolve() / ".shown"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    try:
        from film.app import launch
    except ModuleNotFoundError as error:
        raise UserError(f"the app needs {error.name}; run: pip install -e '.[app]'") from None
    studio = Studio(Filmmaker(config), config.folder, config.preview_steps)
    print(f"open http://127.0.0.1:{config.port} in a browser; Ctrl-C ends it", flush=True)
    launch(studio, config.port)


if __name__ == "__main__":
    main()
