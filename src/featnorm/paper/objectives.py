"""The objectives that the paper compares NAN on, beside the cross entropy of labels."""

from __future__ import annotations

import copy
import math
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from featnorm.augmentation import Distortion, distort, flipped, rotations
from featnorm.training.objectives import Batch, Objective, Step, accuracy, cross_entropy

if TYPE_CHECKING:
    from featnorm.paper.recipe import PaperRecipe

# Keys that MoCo's momentum encoder takes at once; the source has 512 on 8 devices.
_KEYS_A_PASS = 64
# Inputs of a class that CIDER's prototypes begin as the mean of.
_FIRST = 100


class SupCon(Objective):
    """The `supcon` loss of the embeddings that the model returns, of two augmented views of each input."""

    views = 2
    recipe: PaperRecipe

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        return Step(supcon(module(batch.views), batch.targets.repeat(2), self.recipe.temperature, fabric))


class _Contrastive(Objective):
    """On the embeddings of two views of SimCLR of each input."""

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
    """NT-Xent: the other view of an input against all views of all others (Chen et al., ICML 2020, eq. 1).

    It is the `supcon` loss where every input is its own class.
    """

    needs_targets = False

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        return Step(supcon(module(batch.views), batch.indices.repeat(2), self.recipe.temperature, fabric))


class MoCo(_Contrastive):
    """InfoNCE of a query against its key and a queue of earlier keys (MoCo-v2; He et al., CVPR 2020, eq. 1).

    The keys are those of a momentum encoder, a moving average of the model. It takes them in a random order and in
    parts of 64, each normalised by its own statistics, so that these do not give away which key belongs to which
    query: this is what shuffling between devices does in the source. One view is the query, as in MoCo-v2.
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
            # The wrapper for several processes holds the very parameters that are trained.
            for mine, theirs in zip(self.encoder.parameters(), module.parameters(), strict=True):
                mine.lerp_(theirs, 1 - self.recipe.ema)
            keys = self._keys(key_views, fabric)
        queries = nn.functional.normalize(module(query_views).float())
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.T], 1) / self.recipe.temperature
        loss = nn.functional.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.int64, device=keys.device))
        # A new tensor: the old one is needed for the way back.
        self.queue = torch.cat([self.queue, _of_all(keys, 1, fabric)])[-self.recipe.queue :]
        return Step(loss)

    def _keys(self, views: Tensor, fabric: Any) -> Tensor:
        order = torch.randperm(len(views)).to(views.device)
        parts = views[order].tensor_split(max(1, len(views) // _KEYS_A_PASS))
        with _autocast(fabric):
            keys = torch.cat([self.encoder(part) for part in parts])
        return nn.functional.normalize(keys.float())[order.argsort()]


class RotNet(Objective):
    """Cross entropy of the four turns of every input (Gidaris et al., ICLR 2018, eq. 2 and 3).

    The model returns four logits, of 0, 90, 180 and 270 degrees.
    """

    needs_targets = False
    rotates = True

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        rotated = torch.cat(rotations(batch.views))
        logits = module(rotated)
        if logits.shape[1] != 4:
            raise ValueError(f"rotnet tells 4 rotations apart, and the model returns {logits.shape[1]} logits")
        wanted = torch.arange(4, device=rotated.device).repeat_interleave(len(batch.views))
        return Step(cross_entropy(logits, wanted), accuracy(logits, wanted))


class CIDER(_Contrastive):
    """Embeddings near their class's prototype, prototypes far from each other (Ming et al., ICLR 2023).

    ``weight L_comp + L_dis``. L_comp is the cross entropy of an embedding's similarities to the prototypes over
    the temperature, L_dis the mean over the prototypes of the log of the mean exponential of their similarities to
    the others. Prototypes are of unit length; they begin as the mean of up to 100 inputs of their class, and go on
    as a moving average over the embeddings, one after the other.
    """

    prototypes: Tensor

    def begin(self, model: nn.Module, inputs: Tensor, targets: Tensor, seed: int, fabric: Any) -> None:
        """See `Objective`."""
        means = []
        for c in range(int(targets.max()) + 1):
            rows = (targets == c).nonzero()[:_FIRST, 0].to(inputs.device)
            if not len(rows):
                raise ValueError(f"cider has a prototype for every class, and no input has the target {c}")
            means.append(_embeddings(model, inputs[rows], fabric).mean(0))
        if len(means) < 2:
            raise ValueError("cider sets classes apart, and all targets are 0")
        self.register_buffer("prototypes", nn.functional.normalize(torch.stack(means)))

    def forward(self, module: Any, batch: Batch, fabric: Any) -> Step:
        """See `Objective`."""
        unit = nn.functional.normalize(module(batch.views).float())
        # See supcon for the gradients; in the order of one process, which the moving average depends on.
        unit = _of_all(unit, 2, fabric)
        targets = _of_all(batch.targets.repeat(2), 2, fabric)
        loss, self.prototypes = cider(unit, targets, self.prototypes, self.recipe)
        return Step(loss)


class CSI(_Contrastive):
    """SimCLR with an input's rotations as other inputs, and their cross entropy (Tack et al., NeurIPS 2020).

    Every input is mirrored at random and then turned four ways, and each of these is seen in two views that are
    not mirrored. The model returns a mapping with the embeddings and the logits of the rotations, see `CSIHead`.
    """

    needs_targets = False
    rotates = True

    def make_views(
        self, inputs: Tensor, mine: slice, generator: torch.Generator, crop: int | None, device: torch.device
    ) -> Tensor:
        """See `Objective`; the first views of all rotations, then the second."""
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
        # Every rotation of every input is its own class.
        own = (4 * batch.indices + rotation).flatten().repeat(2)
        contrast = supcon(outputs["embedding"], own, self.recipe.temperature, fabric)
        rotated = cross_entropy(outputs["logits"], rotation.expand(4, n).flatten().repeat(2))
        return Step(contrast + self.recipe.weight * rotated)


def supcon(outputs: Tensor, targets: Tensor, temperature: float, fabric: Any) -> Tensor:
    """Return the supervised contrastive loss of embeddings (n, e) (Khosla et al., NeurIPS 2020, eq. 2).

    Averaged over the inputs that share their class with another one; the embeddings are normalised here. Over
    several processes every input is contrasted with those of all of them.
    """
    if fabric is not None and fabric.world_size > 1:
        # With gradients: what each process then finds for its own inputs is summed over the processes by this,
        # and averaged over them again by the data-parallel wrapper.
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
    """Return the loss of `CIDER` and the prototypes as they are after these embeddings.

    Parameters
    ----------
    unit : (n, e) embeddings of unit length.
    targets : (n,).
    prototypes : (classes, e) of unit length.
    recipe : with ``temperature``, ``ema`` and ``weight``.
    """
    counts = torch.bincount(targets, minlength=len(prototypes))
    # The k-th embedding of each class moves its prototype at once with the others' k-th: classes do not mix.
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
    # The prototypes that embeddings are drawn to stand still, as in the source.
    moved = moved.detach()
    compactness = nn.functional.cross_entropy(unit @ moved.T / recipe.temperature, targets)
    return recipe.weight * compactness + dispersion, moved


def _pixels(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float() / 255


def _autocast(fabric: Any) -> AbstractContextManager[Any]:
    return nullcontext() if fabric is None else fabric.autocast()


def _of_all(values: Tensor, views: int, fabric: Any) -> Tensor:
    """Return the values (views n, ...) of all processes, in the order in which one process would have them."""
    if fabric is None or fabric.world_size == 1:
        return values
    gathered = fabric.all_gather(values, sync_grads=values.requires_grad)
    return gathered.unflatten(1, (views, -1)).transpose(0, 1).flatten(0, 2)


@torch.no_grad()
def _embeddings(model: nn.Module, images: Tensor, fabric: Any) -> Tensor:
    """Return unit embeddings (n, e) of images (n, 3, h, w) uint8, in evaluation mode; the model's mode stays."""
    device = next(model.parameters()).device
    training = model.training
    with _autocast(fabric):
        embedding = model.eval()(_pixels(images, device))
    model.train(training)
    return nn.functional.normalize(embedding.float())
