"""Scenes of real pixels with the truth of every pixel: handwritten digits, and foreign objects, on textures."""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from featnorm.inputs import image_tensor, open_source
from featnorm.paper.images import labeled
from featnorm.paper.study import Context, Seeded, Study

SIDE = 64
#: Digits that are in-distribution; the others are objects of unknown classes.
DIGITS = 8
#: Truth of a pixel of a foreign object. The others are 0, the background, or a digit plus one.
FOREIGN = 255
#: Foreign objects, by the words of the tables.
FOREIGN_OBJECTS = {"digits": "digits 8 and 9", "photos": "photographs"}
# A scene has 2 x 2 places for objects, of which each is taken with this probability.
_PLACES, _TAKEN = 2, 0.6
_SIZES = (20, 28)
# Smallest difference in brightness between a digit and the middle of what is behind it.
_CONTRAST = 0.35
_TEXTURE_SIDE = 128


@dataclass(frozen=True)
class Scenes:
    """Scenes (n, 3, 64, 64) uint8, and the truth of their pixels (n, 64, 64), see `FOREIGN`."""

    pixels: Tensor
    truth: Tensor

    def first(self, count: int) -> "Scenes":
        """Return the first scenes."""
        return Scenes(self.pixels[:count], self.truth[:count])


@dataclass(frozen=True)
class Objects:
    """What scenes are made of: textures (t, 3, 128, 128), digits (d, 28, 28) and their labels, and photographs."""

    textures: Tensor
    digits: Tensor
    labels: Tensor
    photos: Tensor

    def draw(self, count: int, seed: int, foreign: str = "") -> Scenes:
        """Return random scenes.

        Parameters
        ----------
        count : number of scenes.
        seed : seed of all random choices.
        foreign : object of unknown class that every scene has: "digits", "photos", or none.
        """
        generator = torch.Generator().manual_seed(seed)
        scenes = Scenes(
            torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8), torch.zeros(count, SIDE, SIDE, dtype=torch.int64)
        )
        known, unknown = (
            (self.labels < DIGITS).nonzero()[:, 0],
            (self.labels >= DIGITS).nonzero()[:, 0],
        )

        def drawn(low: float, high: float) -> float:
            return low + (high - low) * float(torch.rand((), generator=generator))

        def one_of(rows: Tensor | int) -> int:
            number = int(torch.randint(rows if isinstance(rows, int) else len(rows), (), generator=generator))
            return number if isinstance(rows, int) else int(rows[number])

        for pixels, truth in zip(scenes.pixels, scenes.truth, strict=True):
            texture = self.textures[one_of(len(self.textures))]
            top, left = (one_of(_TEXTURE_SIDE - SIDE + 1) for _ in range(2))
            picture = texture[:, top : top + SIDE, left : left + SIDE].float() / 255
            if one_of(2):
                picture = picture.flip(2)
            strange = one_of(_PLACES**2) if foreign else None
            for place in range(_PLACES**2):
                taken = drawn(0, 1) < _TAKEN
                if place != strange and not taken:
                    continue
                size, cell = one_of(_SIZES[1] - _SIZES[0] + 1) + _SIZES[0], SIDE // _PLACES
                y, x = (step * cell + one_of(cell - size + 1) for step in divmod(place, _PLACES))
                rows, columns = slice(y, y + size), slice(x, x + size)
                behind = picture[:, rows, columns]
                if place == strange and foreign == "photos":
                    behind.copy_(_resized(self.photos[one_of(len(self.photos))] / 255, size))
                    truth[rows, columns] = FOREIGN
                    continue
                row = one_of(unknown if place == strange else known)
                ink = _resized(self.digits[row][None] / 255, size)
                color = torch.rand(3, 1, 1, generator=generator)
                gray = behind.mean()
                if (color.mean() - gray).abs() < _CONTRAST:
                    color = (1 - color) * 0.3 + (0.7 if gray < 0.5 else 0)
                behind.copy_(behind * (1 - ink) + color * ink)
                label = FOREIGN if place == strange else int(self.labels[row]) + 1
                truth[rows, columns][ink[0] > 0.5] = label
            pixels.copy_((picture * 255).round())
        return scenes


def _resized(image: Tensor, size: int) -> Tensor:
    return nn.functional.interpolate(image[None].float(), (size, size), mode="bilinear", antialias=True)[0]


def load_objects(context: Context) -> tuple[Objects, Objects]:
    """Return what scenes for training and other scenes are made of, which share no texture, digit or photograph.

    Raises
    ------
    DataError
        One of ``ood224/textures``, ``mnist`` and ``cifar10`` is missing in the data root, or cannot be read.
    """
    textures = image_tensor(
        open_source("ood224/textures", root=context.root), _TEXTURE_SIDE, progress=context.progress
    )
    photos = image_tensor(open_source("cifar10:test", root=context.root), 32, progress=context.progress)
    digits = [
        labeled(open_source(f"mnist:{split}", root=context.root), 28, classes=10, progress=context.progress)
        for split in ("train", "test")
    ]
    third = torch.arange(len(textures)) % 3 == 2
    made = []
    for (images, labels), rows in zip(digits, (~third, third), strict=True):
        made.append(Objects(textures[rows], images[:, 0], labels, photos))
    return made[0], made[1]


@dataclass(frozen=True)
class Seeds:
    """Scale of a study on scenes: the number of its seeds; a subclass adds numbers of scenes."""

    seeds: int


_Scale = TypeVar("_Scale", bound=Seeds)


class SceneStudy(Study[_Scale, tuple[Objects, Objects], Seeded]):
    """A study that trains one network per seed on scenes, and tests it on others."""

    page: ClassVar[str] = "maps-and-boxes"
    grows: ClassVar[bool] = True

    def load(self, scale: _Scale, context: Context) -> tuple[Objects, Objects]:
        """See `Study`."""
        return context.once(load_objects)

    def jobs(self, scale: _Scale, inputs: tuple[Objects, Objects]) -> list[Seeded]:
        """See `Study`."""
        return [Seeded(self.name, seed) for seed in range(scale.seeds)]

    def settings(self, job: Seeded, scale: _Scale, inputs: tuple[Objects, Objects]) -> dict[str, Any]:
        """See `Study`."""
        return {
            "draw": {"seed": job.seed},
            "scenes": {name: count for name, count in asdict(scale).items() if name != "seeds"},
            "made of": [{name: len(part) for name, part in vars(objects).items()} for objects in inputs],
        }
