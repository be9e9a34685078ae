"""Settings of every test: one thread, fixed seeds, hypothesis without deadlines or state between runs."""

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

settings.register_profile("moc", derandomize=True, deadline=None, database=None, max_examples=60)
settings.load_profile("moc")


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
