"""This module has fixtures of the tests of films."""

from pathlib import Path

import pytest
import yaml


@pytest.fixture
def write(tmp_path):
    def write(story: dict, name: str = "story.yaml") -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(story))
        return tmp_path / name

    return write
