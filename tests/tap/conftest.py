from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def seeded() -> Iterator[None]:
    """Run a test with the same random numbers each time, and leave the generator as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
