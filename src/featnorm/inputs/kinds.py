"""Kinds of inputs, such as images and texts: what differs between them, and nothing else."""

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils._pytree import tree_map

from featnorm._utils.layout import fast_layout
from featnorm.inputs.decoding import decode, is_first_of_several, reason_of, to_rgb, upright
from featnorm.inputs.errors import DataError, ItemError

#: A batch of a model, or one input of it: a tensor, or the tensors that the model takes by name. The images of a
#: detector are a list, see `OfAnySize`.
Inputs: TypeAlias = Tensor | Mapping[str, Tensor] | list[Tensor]

#: Longer side of a thumbnail, in pixels.
THUMBNAIL = 64
#: Number of characters of a text that a preview shows.
PREVIEW = 200
# Height and width to which a preprocessed image is pooled for a file.
_BLOCKS = 8


class Kind(ABC):
    """What the items of a source are, and a model's preprocess takes. Defining a subclass registers it.

    Attributes
    ----------
    name, noun : str
        What the items are called, and a single one, in messages: "images" and "image". The name also stands in
        a scorer's file.
    batch_size : int
        Default number of items per batch.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    batch_size: ClassVar[int] = 64

    def __init_subclass__(cls) -> None:
        _KINDS[cls.name] = cls()

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        # One object per kind, also in another process.
        return _named, (self.name,)

    def counted(self, count: int) -> str:
        """Return a number of items in words: "1 image", "1,200 images"."""
        return f"{count:,} {self.noun if count == 1 else self.name}"

    @property
    def one(self) -> str:
        """A single item in words: "an image", "a text"."""
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    def name_of(self, raw: Any, position: int) -> str:
        """Return the name of an item that a user passed at a position."""
        return f"item {position}"

    def is_prepared(self, raw: Any) -> bool:
        """Whether what a user passed is an input of the model, which needs no preprocess."""
        return isinstance(raw, Tensor)

    @abstractmethod
    def item_of(self, raw: Any, name: str) -> Any:
        """Return the item that a user passed, as preprocess takes it.

        Raises
        ------
        ItemError
            It cannot be read.
        TypeError
            It is of another type.
        """

    def sequence_of(self, items: Any) -> Sequence[Any]:
        """Return the items that a user passed; raise a TypeError for a single one."""
        if isinstance(items, (str, bytes, PathLike, Image.Image, np.ndarray, Tensor, Mapping)):
            raise TypeError(f"items must be a sequence, got one {type(items).__name__}: pass [item]")
        return items

    @abstractmethod
    def reference(self, preprocess: Any = None) -> Any:
        """Return the item whose outputs are kept in a scorer's file."""

    def probes(self, preprocess: Any = None) -> Sequence[Any]:
        """Return the items by whose outputs one preprocess is told from another."""
        return [self.reference(preprocess)]

    def fingerprint(self, prepared: Any) -> Tensor:
        """Return what a file keeps of a preprocessed item, to notice another preprocess."""
        return prepared.float().cpu()

    def preview(self, item: Any) -> bytes:
        """Return what a page shows of an item beside others; nothing by default."""
        return b""

    def shown(self, item: Any) -> Any:
        """Return what a page shows of an item: an image, or text."""
        return item

    def is_first_of_several(self, item: Any) -> bool:
        """Whether an item is the first of several in its file."""
        return False

    def check(self, prepared: Any, first: Inputs | None, name: str) -> None:
        """Check what preprocess returned for an item, beside the first one of its batch.

        Raises
        ------
        DataError
            It cannot be in a batch with the first one.
        """
        if not isinstance(prepared, Tensor):
            kind = type(prepared).__name__
            raise DataError(f"the transform returned {kind} for {name}: it must return a Tensor")
        if first is not None and prepared.shape != first.shape:  # type: ignore[union-attr]
            raise DataError(
                f"{name} has shape {tuple(prepared.shape)} after the transform, the ones before it in the batch "
                f"{tuple(first.shape)}: use a transform that {self._to_one_shape}"  # type: ignore[union-attr]
            )

    def check_source(self, source: Any, preprocess: Any) -> None:  # noqa: B027  most kinds have no columns
        """Check that a source has the columns that a preprocess takes; raise a `DataError` if it does not."""

    _to_one_shape = "returns one shape"

    def collate(self, prepared: Sequence[Any], preprocess: Any = None) -> Any:
        """Return preprocessed items as a batch, `Inputs`.

        Parameters
        ----------
        prepared : sequence of Tensor or mapping
            The items.
        preprocess : callable, optional
            What prepared them.
        """
        return torch.stack([*prepared])


_KINDS: dict[str, Kind] = {}


class OfAnySize:
    """A preprocess of images whose tensors (c, H, W) may differ in size: a batch of them is a list.

    Parameters
    ----------
    transform : callable
        The preprocess of one image.
    """

    def __init__(self, transform: Callable[[Image.Image], Tensor]) -> None:
        self.transform: Callable[[Image.Image], Tensor] = (
            transform.transform if isinstance(transform, OfAnySize) else transform
        )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the tensor of an image."""
        return self.transform(image)


class _Images(Kind):
    """Images, as PIL images in RGB; preprocess returns tensors (c, H, W) of one shape, or is `OfAnySize`."""

    name = "images"
    noun = "image"
    _to_one_shape = "resizes all images to one size or, for an object detector, per='box' (--per box)"

    def name_of(self, raw: Any, position: int) -> str:
        return fspath(raw) if isinstance(raw, (str, PathLike)) else super().name_of(raw, position)

    def item_of(self, raw: Any, name: str) -> Image.Image:
        if isinstance(raw, (str, PathLike)):
            try:
                return decode(Path(raw).read_bytes(), name)
            except OSError as error:
                raise ItemError(name, reason_of(error)) from None
        if isinstance(raw, Image.Image):
            return to_rgb(raw.copy, name)
        if isinstance(raw, np.ndarray):
            return to_rgb(lambda: _image_of(raw), name)
        if hasattr(raw, "to_image"):  # a frame that PyAV has decoded
            return upright(raw, name)
        raise TypeError(
            f"{name} is of type {type(raw).__name__}: expected a path, a PIL image, an array or a tensor"
        )

    def reference(self, preprocess: Any = None) -> Image.Image:
        ramp = np.arange(256, dtype=np.uint8)
        red, green = np.meshgrid(ramp, ramp[::-1][:192])
        return Image.fromarray(np.stack([red, green, red // 2 + green // 4], 2))

    def probes(self, preprocess: Any = None) -> Sequence[Image.Image]:
        noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
        return [Image.fromarray(noise), Image.fromarray(noise[:47, :61])]

    def fingerprint(self, prepared: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(prepared.float().cpu(), _BLOCKS)

    def collate(self, prepared: Sequence[Any], preprocess: Any = None) -> Inputs:
        return [*prepared] if isinstance(preprocess, OfAnySize) else super().collate(prepared)

    def preview(self, item: Image.Image) -> bytes:
        """Return a thumbnail as a JPEG file of at most 64 x 64 pixels."""
        small = item.copy()  # `thumbnail` works in place
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=75, optimize=True)
        return buffer.getvalue()

    def is_first_of_several(self, item: Image.Image) -> bool:
        return is_first_of_several(item)


class _Frames(_Images):
    """Frames of videos: images for a model, and called by their own name."""

    name = "frames"
    noun = "frame"


class _Texts(Kind):
    """Texts, as str; preprocess returns the tensors (L,) that the model takes by name, one value per token.

    A batch pads them to its longest text with 0, or with what the preprocess has as ``padding``, a mapping of
    name to value.
    """

    name = "texts"
    noun = "text"

    def sequence_of(self, items: Any) -> Sequence[Any]:
        """Return the texts of a sequence, an array or a pandas Series."""
        if is_data_frame(items):
            raise TypeError("texts must be a sequence, got a DataFrame: pass the column of the texts")
        if getattr(items, "ndim", 0) == 1 and hasattr(items, "tolist") and not isinstance(items, Tensor):
            items = items.tolist()
        return super().sequence_of(items)

    def is_prepared(self, raw: Any) -> bool:
        return isinstance(raw, Mapping)

    def item_of(self, raw: Any, name: str) -> str:
        if not isinstance(raw, str):
            raise TypeError(f"{name} is of type {type(raw).__name__}: expected a str, or a mapping of tensors")
        if not raw or raw.isspace():
            raise ItemError(name, "an empty text")
        if "\0" in raw:
            raise ItemError(name, "it has a NUL character, so it is not text")
        try:
            raw.encode()
        except UnicodeEncodeError:
            raise ItemError(name, "it is not valid UTF-8") from None
        return raw

    def reference(self, preprocess: Any = None) -> str:
        return "The quick brown fox jumps over the lazy dog, and 13 others look on."

    def probes(self, preprocess: Any = None) -> Sequence[str]:
        return [self.reference(), "¿Qué? " + 100 * "Noise 0.5\t"]

    def fingerprint(self, prepared: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([prepared[name].float().cpu() for name in sorted(prepared)])

    def preview(self, item: str) -> bytes:
        """Return the first 200 characters in UTF-8, with an ellipsis if there are more."""
        return _beginning(item)

    def check(self, prepared: Any, first: Inputs | None, name: str) -> None:
        if not isinstance(prepared, Mapping) or not all(
            isinstance(value, Tensor) and value.ndim == 1 for value in prepared.values()
        ):
            raise DataError(
                f"the transform returned {type(prepared).__name__} for {name}: it must return a mapping of "
                "tensors with one value per token"
            )

    def collate(self, prepared: Sequence[Any], preprocess: Any = None) -> Inputs:
        padding = getattr(preprocess, "padding", {})
        return {
            key: pad_sequence([one[key] for one in prepared], batch_first=True, padding_value=padding.get(key, 0))
            for key in prepared[0]
        }


class _Rows(Kind):
    """Rows of an array or a table, as sequences of numbers or mappings of column to value.

    Preprocess is a `featnorm.inputs.rows.Rows`, or another function that returns tensors (D,).
    """

    name = "rows"
    noun = "row"
    batch_size = 1024

    def sequence_of(self, items: Any) -> Sequence[Any]:
        """Return the rows of an array, a tensor, a DataFrame or a sequence."""
        if is_data_frame(items):
            return items.astype(object).where(items.notna(), None).to_dict("records")
        if not isinstance(items, (np.ndarray, Tensor)):
            return super().sequence_of(items)
        if items.ndim != 2:
            raise TypeError(f"rows must be of shape (n, D), got {tuple(items.shape)}: pass row[None] for one row")
        return items if isinstance(items, np.ndarray) else items.detach().float().cpu().numpy()  # type: ignore[return-value]

    def is_prepared(self, raw: Any) -> bool:
        return False

    def item_of(self, raw: Any, name: str) -> Any:
        if isinstance(raw, Tensor):
            raw = raw.detach().float().cpu().numpy()
        if isinstance(raw, Mapping) or (isinstance(raw, Sequence) and not isinstance(raw, (str, bytes))):
            return raw
        if not isinstance(raw, np.ndarray) or raw.ndim != 1:
            raise TypeError(f"{name} is of type {type(raw).__name__}: expected a row, or a mapping of its columns")
        return raw

    def reference(self, preprocess: Any = None) -> Any:
        return preprocess.reference()

    def shown(self, item: Any) -> str:
        """Return the columns with their values, or the numbers."""
        pairs = item.items() if isinstance(item, Mapping) else None
        values = (
            [f"{x:.3g}" for x in item] if pairs is None else [f"{k}: {'' if v is None else v}" for k, v in pairs]
        )
        return ", ".join(values)

    def preview(self, item: Any) -> bytes:
        """Return the first 200 characters of `shown` in UTF-8."""
        return _beginning(self.shown(item))

    def check_source(self, source: Any, preprocess: Any) -> None:
        if hasattr(preprocess, "check"):
            preprocess.check(source)


IMAGES, FRAMES, TEXTS, ROWS = (_KINDS[name] for name in ("images", "frames", "texts", "rows"))


def _named(name: str) -> Kind:
    return _KINDS[name]


def kind_of(what: Any) -> Kind:
    """Return the kind of that name, or the one that a preprocess names in its attribute ``kind``; or else images.

    Raises
    ------
    ValueError
        There is no such kind.
    """
    name = what if isinstance(what, str) else getattr(what, "kind", IMAGES.name)
    taken = [one for one in _KINDS if one != FRAMES.name]  # frames are images to a preprocess
    if name not in taken:
        raise ValueError(f"unknown kind of inputs {name!r}: use one of {', '.join(taken)}")
    return _KINDS[name]


def to_device(inputs: Inputs, device: torch.device) -> Inputs:
    """Return a batch on a device, in the layout in which networks are fastest."""
    return tree_map(lambda tensor: fast_layout(tensor.to(device)), inputs)


def rows_in(inputs: Inputs, rows: Any) -> Inputs:
    """Return some rows of a batch: a slice, or indices."""
    return inputs[rows] if isinstance(inputs, list) else tree_map(lambda tensor: tensor[rows], inputs)


def run(module: Any, inputs: Inputs) -> Any:
    """Call a module with a batch: with a tensor, or by name."""
    return module(**inputs) if isinstance(inputs, Mapping) else module(inputs)


def is_data_frame(data: Any) -> bool:
    """Return whether data are a `pandas.DataFrame`, which need not be imported for this."""
    return hasattr(data, "columns") and hasattr(data, "iloc")


def _beginning(text: str) -> bytes:
    return (text if len(text) <= PREVIEW else text[:PREVIEW] + "…").encode()


def _image_of(array: np.ndarray[Any, Any]) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype} is not an image: expected (H, W), (H, W, 3) "
            "or (H, W, 4) of type uint8"
        )
    return Image.fromarray(array)
