"""Every run of characters is drawn in a font that has them."""

from pathlib import Path

import matplotlib
import numpy as np
import pytest

from film import lettering


def test_fonts_that_have_the_characters_are_taken(tmp_path, monkeypatch, caplog):
    """A font of mathematics, with its script capitals, stands for one of the system that has Chinese."""
    fonts = Path(matplotlib.get_data_path(), "fonts/ttf")
    text, usual = "a \N{SCRIPT CAPITAL L} \N{MATHEMATICAL SCRIPT CAPITAL A}b", fonts / "DejaVuSans.ttf"
    lettering._fonts.cache_clear()
    system = [str(tmp_path / "broken.ttf"), str(fonts / "STIXGeneral.ttf")]
    monkeypatch.setattr(lettering, "_system_fonts", lambda: system)
    assert lettering._fonts("abc", False) == (str(usual),)
    chosen = lettering._fonts(text, False)
    assert chosen == (str(usual), system[1])
    runs = list(lettering._runs(text, chosen))
    assert [run for run, _ in runs] == ["a \N{SCRIPT CAPITAL L} ", "\N{MATHEMATICAL SCRIPT CAPITAL A}", "b"]
    assert [Path(file).stem for _, file in runs] == ["DejaVuSans", "STIXGeneral", "DejaVuSans"]
    assert not caplog.messages
    lettering._tell_missing.cache_clear()
    for caption in ("兔子 a", "草地 a"):
        lettering._fonts(caption, False)
    assert len(caplog.messages) == 1
    assert "fonts-noto-cjk" in caplog.text
    lettering._fonts.cache_clear()


def test_what_changes_a_character_stays_with_it():
    """A variation selector or an accent is drawn in the font of the character before it."""
    usual = lettering._fonts("a", False)
    assert list(lettering._runs("\N{SNOWMAN}\ufe0f e\u0301", usual)) == [("\N{SNOWMAN}\ufe0f e\u0301", usual[0])]


@pytest.mark.skipif(not Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf").exists(), reason="needs the font")
def test_emoji_have_colours():
    picture = np.asarray(lettering.draw_text("a \N{RABBIT FACE} \N{FIRE}", (200, 30), 16)).astype(int)
    assert (np.ptp(picture, axis=2) > 80).sum() > 20
