"""Which layer a norm should read: the NormRatio of images and their jigsaws (Yu et al., CVPR 2023)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from featnorm.tap.capture import HookPoint
from featnorm.tap.find import unit_axis
from featnorm.tap.ops import is_rectified
from featnorm.tap.trace import ModuleIO, Node, Trace


class RankedLayer(NamedTuple):
    """A layer and how it tells images from their jigsaws."""

    name: str  # of the module that returns it, for ``FeatureTap(model, layer=)``
    ratio: float  # NormRatio: mean over the images of norm(image) / norm(jigsaw)
    deviation: float  # standard deviation of these ratios


@dataclass(frozen=True, repr=False)
class LayerRanking:
    """Layers of a model, those with the largest NormRatio first; its `repr` is a table."""

    layers: list[RankedLayer]
    excluded: Mapping[str, str]  # reasons why layers have no ratio, by name
    images: int

    @property
    def best(self) -> str:
        """Name of the layer with the largest ratio."""
        return self.layers[0].name

    def __repr__(self) -> str:
        width = max(len("layer"), *(len(layer.name) for layer in self.layers))
        lines = [f"{'layer':{width}}  NormRatio  deviation"]
        lines += [f"{name:{width}}  {ratio:9.3f}  {deviation:9.3f}" for name, ratio, deviation in self.layers]
        lines += [f"excluded: {name}, {why}" for name, why in self.excluded.items()]
        return "\n".join([*lines, f"{self.images} images and their jigsaws"])


def candidates(traced: Trace, model: nn.Module) -> dict[str, HookPoint]:
    """Return the points of the rectified maps and tokens that modules return, by the name of the module.

    Raises
    ------
    ValueError
        There are none.
    """
    returned: dict[str, ModuleIO] = {}  # the value that `layer=` means: the first of the last call
    for io in traced.module_io:
        if io.side == "out" and io.module and (io.module not in returned or io.call > returned[io.module].call):
            returned[io.module] = io
    found: dict[Node, HookPoint] = {}
    # Of several modules that return one value, the outermost is kept, or else the first.
    for io in sorted(returned.values(), key=lambda io: (io.module.count("."), io.time)):
        node, shape = io.node, io.node.shape
        if node in found or not node.from_input or len(shape) < 3 or shape[0] != traced.batch:
            continue
        if not node.value.is_floating_point() or not is_rectified(node):
            continue
        axis = unit_axis(node, model.get_submodule(io.module))
        if axis and node.value.numel() > shape[0] * shape[axis]:
            found[node] = HookPoint("out", io.module, io.call, io.slot, 0, False, axis=axis, pooling="norm")
    if not found:
        raise ValueError(
            "the model has no layers to rank: none of its modules returns rectified maps (n, d, h, w) or tokens "
            "(n, ..., d)"
        )
    return {point.module: point for point in found.values()}


class Ratios:
    """Running sums of the ratios norm(image) / norm(jigsaw) of every layer, in float64."""

    def __init__(self) -> None:
        self._images = 0
        self._sums: dict[str, Tensor] = {}  # sum and sum of squares of the ratio, and number that is not finite

    def add(self, plain: Mapping[str, Tensor], shuffled: Mapping[str, Tensor]) -> None:
        """Add images, given the norms (n, d) of their maps and of those of their jigsaws, by layer."""
        for name, norms in plain.items():
            ratio = norms.double().mean(1) / shuffled[name].double().mean(1)
            finite = ratio.isfinite()
            kept = ratio[finite]
            sums = torch.stack([kept.sum(), kept.square().sum(), (~finite).sum()]).cpu()
            self._sums[name] = self._sums.get(name, 0) + sums
        self._images += len(ratio)

    def ranking(self) -> LayerRanking:
        """Return the layers whose ratio is finite for every image, ranked.

        Raises
        ------
        ValueError
            No layer has a finite ratio.
        """
        layers, excluded = [], {}
        for name, sums in self._sums.items():
            total, squares, undefined = sums.tolist()
            if undefined:
                excluded[name] = f"norm 0 or not finite for {undefined:.0f} of {self._images} images or jigsaws"
                continue
            mean = total / self._images
            layers.append(RankedLayer(name, mean, max(squares / self._images - mean**2, 0.0) ** 0.5))
        if not layers:
            raise ValueError(
                "no layer can be ranked: " + "; ".join(f"`{name}` has {why}" for name, why in excluded.items())
            )
        return LayerRanking(sorted(layers, key=lambda layer: -layer.ratio), excluded, self._images)
