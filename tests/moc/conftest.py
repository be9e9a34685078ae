"""What tests of training share."""

import pytest

from tests.runs import make_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A small cache to train the debug model on; returns its folder."""
    return make_cache(tmp_path_factory.mktemp("cache"))
