import numpy as np
import pytest
from painted import paint

from featnorm.models import create_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """240 pictures of four classes; one is corrupt, and one is there twice."""
    folder = tmp_path_factory.mktemp("own")
    random = np.random.default_rng(0)
    for i in range(240):
        paint(folder / "abcd"[i % 4] / f"{i:03}.png", i % 4, random)
    (folder / "a" / "000.png").write_bytes(b"broken")
    (folder / "b" / "copy.png").write_bytes((folder / "b" / "001.png").read_bytes())
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def loaded():
    return create_model("featnorm:cifar10-resnet18")
