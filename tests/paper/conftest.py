import pytest

from reproduction import write_images


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data root with a CIFAR-10, an MNIST and OOD sets of a few fabricated images each."""
    root = tmp_path_factory.mktemp("data")
    for split, count, seed in (("train", 12, 0), ("test", 4, 1)):
        for c in range(10):
            write_images(root / "cifar10" / split / f"{c}", count, 10 * seed + c, shift=15 * c)
            write_images(root / "mnist" / split / f"{c}", count, 10 * seed + c, size=28, shift=15 * c)
    write_images(root / "ood32" / "noise", 12, 100)
    write_images(root / "ood32" / "large", 11, 101, size=48, shift=100)
    write_images(root / "svhn" / "test", 10, 102)
    return root
