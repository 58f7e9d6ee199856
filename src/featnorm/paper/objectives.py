"""The objectives of the networks that the paper compares NAN on, besides the cross entropy of labels."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featnorm.augmentation import Distortion, distort, flipped, rotations
from featnorm.training.objectives import Batch, Objective, Step, accuracy, cross_entropy

if TYPE_CHECKING:
    from featnorm.paper.recipe import PaperRecipe

# Keys per pass of MoCo's momentum encoder; the source has 512 on 8 devices.
_KEYS_PER_PASS = 64
# Inputs of a class whose mean is the initial prototype of CIDER.
_FIRST_INPUTS = 100


class SupCon(Objective):
    """The `supcon` loss of the embeddings that the model returns, of two augmented views of each input."""

    views = 2
    recipe: PaperRecipe

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        return Step(supcon(module(batch.views), batch.targets.repeat(2), self.recipe.temperature, fabric))


class _Contrastive(Objective):
    """Base of the objectives that read embeddings of two SimCLR views of each input."""

    views = 2
    recipe: PaperRecipe

    def make_views(
        self, inputs: Tensor, mine: slice, generator: torch.Generator, crop: int | None, device: torch.device
    ) -> Tensor:
        """See `Objective`."""
        pixels = _pixels(inputs[mine], device)
        views = []
        for _ in range(self.views):
            drawn = self._draw(inputs, generator)
            views.append(distort(pixels, drawn.of(mine), crop))
        return torch.cat(views)

    def _draw(self, inputs: Tensor, generator: torch.Generator, flips: bool = True) -> Distortion:
        height, width = inputs.shape[2:]
        scale = (self.recipe.scale, 1.0)
        return Distortion.draw(len(inputs), (height, width), generator, scale=scale, flips=flips)


class SimCLR(_Contrastive):
    """NT-Xent: contrasts the two views of an input with all views of all others (Chen et al., ICML 2020, eq. 1).

    It is the `supcon` loss with a class of its own for each input.
    """

    needs_targets = False

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        return Step(supcon(module(batch.views), batch.indices.repeat(2), self.recipe.temperature, fabric))


class MoCo(_Contrastive):
    """InfoNCE of a query against its key and a queue of earlier keys (MoCo-v2; He et al., CVPR 2020, eq. 1).

    A momentum encoder, a moving average of the model, computes the keys, in random order and in parts of 64. Each
    part is normalized by its own batch statistics, so that these do not reveal which key belongs to which query:
    shuffling between devices has this effect in the source. One view is the query, as in MoCo-v2.
    """

    needs_targets = False
    queue: Tensor

    def begin(self, model: nn.Module, inputs: Tensor, targets: Tensor, seed: int, fabric: Any) -> None:
        """See `Objective`."""
        self.encoder = copy.deepcopy(model).train().requires_grad_(False)
        embedding = _embeddings(model, inputs[:2], fabric)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(self.recipe.queue, embedding.shape[1], generator=generator, dtype=torch.float32)
        self.register_buffer("queue", nn.functional.normalize(noise).to(embedding.device))

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        query_views, key_views = batch.views.chunk(2)
        with torch.no_grad():
            # The wrapper for several processes holds the same parameters that are trained.
            for mine, theirs in zip(self.encoder.parameters(), module.parameters(), strict=True):
                mine.lerp_(theirs, 1 - self.recipe.ema)
            keys = self._keys(key_views, fabric)
        queries = nn.functional.normalize(module(query_views).float())
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.T], 1) / self.recipe.temperature
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=keys.device))
        # A new tensor, since the backward pass needs the old one.
        self.queue = torch.cat([self.queue, _of_all(keys, 1, fabric)])[-self.recipe.queue :]
        return Step(loss)

    def _keys(self, views: Tensor, fabric: Any) -> Tensor:
        order = torch.randperm(len(views)).to(views.device)
        parts = views[order].tensor_split(max(1, len(views) // _KEYS_PER_PASS))
        with fabric.autocast():
            keys = torch.cat([self.encoder(part) for part in parts])
        return nn.functional.normalize(keys.float())[order.argsort()]


class RotNet(Objective):
    """Cross entropy of the four rotations of every input (Gidaris et al., ICLR 2018, eq. 2 and 3).

    The model returns four logits, for 0, 90, 180 and 270 degrees.
    """

    needs_targets = False
    rotates = True

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        rotated = torch.cat(rotations(batch.views))
        logits = module(rotated)
        if logits.shape[1] != 4:
            raise ValueError(
                f"rotnet needs 4 logits, one per rotation, and the model returns {logits.shape[1]} logits"
            )
        targets = torch.arange(4, device=rotated.device).repeat_interleave(len(batch.views))
        return Step(cross_entropy(logits, targets), accuracy(logits, targets))


class CIDER(_Contrastive):
    """Embeddings close to the prototype of their class, prototypes far from each other (Ming et al., ICLR 2023).

    ``weight L_comp + L_dis``. L_comp is the cross entropy of an embedding's similarities to the prototypes,
    divided by the temperature; L_dis is the mean over the prototypes of the log of the mean exponential of their
    similarities to the others. Prototypes have unit length; they start as the mean of up to 100 inputs of their
    class, and are then moving averages over the embeddings, one after the other.
    """

    prototypes: Tensor

    def begin(self, model: nn.Module, inputs: Tensor, targets: Tensor, seed: int, fabric: Any) -> None:
        """See `Objective`."""
        means = []
        for c in range(int(targets.max()) + 1):
            rows = (targets == c).nonzero()[:_FIRST_INPUTS, 0].to(inputs.device)
            if not len(rows):
                raise ValueError(
                    f"cider needs an input of every class for its prototype, and no input has the target {c}"
                )
            means.append(_embeddings(model, inputs[rows], fabric).mean(0))
        if len(means) < 2:
            raise ValueError("cider needs at least two classes, and all targets are 0")
        self.register_buffer("prototypes", nn.functional.normalize(torch.stack(means)))

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        unit = nn.functional.normalize(module(batch.views).float())
        # For the gradients see supcon. The moving average depends on the order, which is that of one process.
        unit = _of_all(unit, 2, fabric)
        targets = _of_all(batch.targets.repeat(2), 2, fabric)
        loss, self.prototypes = cider(unit, targets, self.prototypes, self.recipe)
        return Step(loss)


class CSI(_Contrastive):
    """SimCLR with an input's rotations as other inputs, and their cross entropy (Tack et al., NeurIPS 2020).

    Every input is randomly mirrored and then rotated by 0, 90, 180 and 270 degrees; each rotation has two views,
    which are not mirrored. The model returns a mapping with the embeddings and the logits of the rotations, see
    `CSIHead`.
    """

    needs_targets = False
    rotates = True

    def make_views(
        self, inputs: Tensor, mine: slice, generator: torch.Generator, crop: int | None, device: torch.device
    ) -> Tensor:
        """See `Objective`; the first views of all rotations come first, then the second views."""
        views = []
        for _ in range(self.views):
            pixels = _pixels(flipped(inputs, generator)[mine], device)
            views += [
                distort(rotated, self._draw(inputs, generator, flips=False).of(mine), crop)
                for rotated in rotations(pixels)
            ]
        return torch.cat(views)

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        outputs = module(batch.views)
        rotation = torch.arange(4, device=batch.indices.device)[:, None]
        n = len(batch.indices)
        # Every rotation of every input is a class of its own.
        own = (4 * batch.indices + rotation).flatten().repeat(2)
        contrast = supcon(outputs["embedding"], own, self.recipe.temperature, fabric)
        rotated = cross_entropy(outputs["logits"], rotation.expand(4, n).flatten().repeat(2))
        return Step(contrast + self.recipe.weight * rotated)


def supcon(outputs: Tensor, targets: Tensor, temperature: float, fabric: Any) -> Tensor:
    """Return the supervised contrastive loss of embeddings (n, e) (Khosla et al., NeurIPS 2020, eq. 2).

    It is averaged over the inputs that share their class with another one. The embeddings are normalized here.
    With several processes, every input is contrasted with the inputs of all of them.
    """
    if fabric.world_size > 1:
        # With gradients: this sums the gradients of each process's own inputs over the processes, and the
        # data-parallel wrapper averages them again.
        outputs = fabric.all_gather(outputs, sync_grads=True).flatten(0, 1)
        targets = fabric.all_gather(targets).flatten()
    unit = nn.functional.normalize(outputs.float())
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (targets[:, None] == targets) & ~itself
    counts = positive.sum(1)
    mean = log_share.masked_fill(~positive, 0.0).sum(1) / counts.clamp_min(1)
    return -mean.sum() / (counts > 0).sum().clamp_min(1)


def cider(unit: Tensor, targets: Tensor, prototypes: Tensor, recipe: PaperRecipe) -> tuple[Tensor, Tensor]:
    """Return the loss of `CIDER`, and the prototypes after their update by these embeddings.

    Parameters
    ----------
    unit : embeddings (n, e) of unit length.
    targets : classes (n,).
    prototypes : (classes, e), of unit length.
    recipe : its ``temperature``, ``ema`` and ``weight`` are used.
    """
    counts = torch.bincount(targets, minlength=len(prototypes))
    # The k-th embeddings of all classes move their prototypes at the same time, since classes do not interact.
    order = targets.argsort(stable=True)
    starts = counts.cumsum(0) - counts
    moved = prototypes
    for k in range(int(counts.max())):
        classes = (counts > k).nonzero().squeeze(1)
        now = recipe.ema * moved[classes] + (1 - recipe.ema) * unit[order[starts[classes] + k]]
        moved = moved.index_copy(0, classes, nn.functional.normalize(now))
    others = ~torch.eye(len(moved), dtype=torch.bool, device=moved.device)
    similar = (moved @ moved.T / recipe.temperature)[others].reshape(len(moved), -1)
    dispersion = (similar.logsumexp(1) - math.log(len(moved) - 1)).mean()
    # No gradients through the prototypes here, as in the source.
    moved = moved.detach()
    compactness = nn.functional.cross_entropy(unit @ moved.T / recipe.temperature, targets)
    return recipe.weight * compactness + dispersion, moved


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float() / 255


def _of_all(values: Tensor, views: int, fabric: Any) -> Tensor:
    """Return the values (views n, ...) of all processes, in the order of one process."""
    if fabric.world_size == 1:
        return values
    gathered = fabric.all_gather(values, sync_grads=values.requires_grad)
    return gathered.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def _embeddings(model: nn.Module, images: Tensor, fabric: Any) -> Tensor:
    """Return unit embeddings (n, e) of images (n, 3, h, w) uint8, in evaluation mode; the mode is restored."""
    device = next(model.parameters()).device
    training = model.training
    with fabric.autocast():
        embedding = model.eval()(_pixels(images, device))
    model.train(training)
    return nn.functional.normalize(embedding.float())
