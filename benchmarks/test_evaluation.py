"""Twelve detectors fitted and evaluated on four data sets, compared with one forward pass: at most 15 % more."""

import torch

import featnorm as fn
from featnorm.evaluation import compare as compare_detectors
from featnorm.models import cifar_network

BATCH = 128
DETECTORS = (
    fn.NAN,
    fn.L1Norm,
    fn.Sparsity,
    fn.MSP,
    fn.MaxLogit,
    fn.Energy,
    fn.KLUniform,
    fn.Mahalanobis,
    fn.SSD,
    fn.KNN,
    fn.Residual,
    fn.ViM,
)


def images(n):
    pixels = torch.rand(n, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return list(zip(pixels.split(BATCH), (torch.arange(n) % 10).split(BATCH), strict=True))


def test_from_images(compare, size):
    width, fit, test = size(64, 16), size(4000, 640), size(1500, 128)
    model = cifar_network(width, 10).eval().to(memory_format=torch.channels_last)
    tap = fn.FeatureTap(model)
    train = images(fit)
    sets = {name: images(test) for name in ("ID", "OOD 1", "OOD 2", "OOD 3")}

    def forward():
        with torch.no_grad():
            for batches in (train, *sets.values()):
                for pixels, _ in batches:
                    model(pixels)

    def evaluate():
        streams = {name: tap.stream(batches, progress=False) for name, batches in sets.items()}
        found = compare_detectors(
            [detector() for detector in DETECTORS],
            fit=tap.stream(train, progress=False),
            id_set=("ID", streams.pop("ID")),
            ood_sets=streams,
        )
        assert not found.excluded

    compare.time(
        "twelve detectors, fitted and measured on four sets",
        evaluate,
        {"one forward pass over the same images": (forward, 1.15)},
        rounds=3,
        sizes=f"{fit} images to fit on and 4 x {test} of 32 x 32, CIFAR's ResNet-18 of width {width}",
        warm=False,
    )
