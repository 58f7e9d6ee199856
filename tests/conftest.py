import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data: parquet files described in their own README."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    for place in (os.environ.get("FEATNORM_DATA"), beside):
        if place and (Path(place) / "imagenet1k_sample" / "test.parquet").is_file():
            return Path(place)
    pytest.skip("real data not here: set FEATNORM_DATA or place shared/data beside the checkout")
