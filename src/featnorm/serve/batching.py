"""The images of all waiting requests, joined into batches for one model."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import torch
from starlette.exceptions import HTTPException
from torch import Tensor

from featnorm.image_scorer import ImageVerdict
from featnorm.inputs.images import ImageError, decode, first_line
from featnorm.serve.bodies import Upload
from featnorm.serve.decoding import Decoders
from featnorm.serve.limits import RETRY, Limits

log = logging.getLogger("featnorm.serve")

# What an encoded byte counts at least: a photograph has more pixels than that for each, and a file that is made to
# be slow has fewer.
_PIXELS_PER_BYTE = 4


@dataclass(eq=False)
class Waiting:
    """An image that waits for the model, and who waits for its verdict."""

    upload: Upload
    explain: bool
    future: asyncio.Future[ImageVerdict]
    tensor: Tensor = field(default_factory=lambda: torch.empty(0))


class Batcher:
    """Judges the images of any number of requests, as many at once as wait when the model becomes free.

    Images are decoded in two threads, and judged in one. `run` has to run meanwhile.

    Parameters
    ----------
    prepare : from an image in RGB to a tensor; the transform.
    predict : from one or more waiting images with tensors to the verdict on each.
    limits : the bounds.
    on_batch : told the size of each batch.
    """

    def __init__(
        self,
        prepare: Callable[..., Tensor],
        predict: Callable[[Sequence[Waiting]], list[ImageVerdict]],
        limits: Limits,
        on_batch: Callable[[int], None],
    ) -> None:
        self._prepare = prepare
        self._predict = predict
        self._limits = limits
        self._on_batch = on_batch
        self._waiting: set[Waiting] = set()
        self._ready: deque[Waiting] = deque()
        self._some = asyncio.Event()
        self._decoders = Decoders()
        self._model = ThreadPoolExecutor(1, "featnorm-model")

    @property
    def waiting(self) -> int:
        """The images that were let in and are not with the model yet."""
        return len(self._waiting)

    async def score(self, uploads: Sequence[Upload], explain: bool = False) -> list[ImageVerdict]:
        """Judge the images of one request, in their order. When it is cancelled, those that wait are dropped.

        Raises
        ------
        HTTPException
            Too many images or pixels wait already, or the request has too many pixels by itself.
        """
        limits = self._limits
        if len(self._waiting) + len(uploads) > limits.queue:
            raise HTTPException(503, f"{len(self._waiting)} images wait already: try again later", RETRY)
        costs = [self._cost(upload) for upload in uploads]
        pixels = sum(costs)
        if pixels > limits.queue_pixels:
            raise HTTPException(
                413,
                f"the images count as {pixels:,} pixels, more than {limits.queue_pixels:,}: send them one by one",
            )
        if self._decoders.pixels + pixels > limits.queue_pixels:
            raise HTTPException(503, f"{self._decoders.pixels:,} pixels wait already: try again later", RETRY)
        loop = asyncio.get_running_loop()
        images = [Waiting(upload, explain, loop.create_future()) for upload in uploads]
        self._waiting.update(images)
        # All at once, so that the next request finds them counted.
        made = [
            self._decoders.submit(partial(self._read, upload), cost, before)
            for upload, cost, before in zip(uploads, costs, accumulate(costs, initial=0), strict=False)
        ]
        try:
            return await asyncio.gather(*map(self._follow, images, made))
        finally:
            self._waiting.difference_update(images)
            for decoded, image in zip(made, images, strict=True):
                decoded.cancel()
                image.future.cancel()

    async def run(self) -> None:
        """Judge what comes, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            await self._some.wait()
            batch = self._take()
            if not batch:
                self._some.clear()
                continue
            self._on_batch(len(batch))
            outcomes = await loop.run_in_executor(self._model, self._outcomes, batch)
            for image, outcome in zip(batch, outcomes, strict=True):
                if image.future.done():  # nobody waits for it any more
                    continue
                if isinstance(outcome, Exception):
                    image.future.set_exception(outcome)
                else:
                    image.future.set_result(outcome)

    def close(self) -> None:
        """Let the threads end."""
        self._decoders.close()
        self._model.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, image: Waiting, decoded: asyncio.Future[Tensor | str]) -> ImageVerdict:
        made = await decoded
        if isinstance(made, str):
            self._waiting.discard(image)
            return unreadable(image.upload.name, made)
        image.tensor = made
        self._ready.append(image)
        self._some.set()
        return await image.future

    def _cost(self, upload: Upload) -> int:
        """Return the pixels that an image counts as while it waits."""
        # One that has too many is refused by its header, and not decoded.
        pixels, decoding, opening = upload.measure
        cost = opening + (decoding if pixels <= self._limits.pixels else 0)
        return min(max(cost, _PIXELS_PER_BYTE * len(upload.data)), self._limits.queue_pixels)

    def _read(self, upload: Upload) -> Tensor | str:
        """Return what the transform makes of an image, or why it cannot be judged."""
        if upload.error is not None:
            return upload.error
        try:
            image = decode(upload.data, upload.name, most_pixels=self._limits.pixels)
        except ImageError as error:
            return error.reason
        try:
            return self._prepare(image)
        except Exception:
            log.exception("the transform failed on an image of %d x %d pixels", *image.size)
            return "the transform failed on it"

    def _take(self) -> list[Waiting]:
        batch: list[Waiting] = []
        while self._ready and len(batch) < self._limits.batch_size:
            image = self._ready.popleft()
            if not image.future.done():
                self._waiting.discard(image)
                batch.append(image)
        return batch

    def _outcomes(self, batch: Sequence[Waiting]) -> list[ImageVerdict | Exception]:
        """Judge a batch; where that fails, its images one by one, so that only the culprit's request is told."""
        try:
            return [*self._predict(batch)]
        except Exception as error:
            if len(batch) > 1:
                return [outcome for image in batch for outcome in self._outcomes([image])]
            if isinstance(error, ValueError):  # what a detector refuses, in its own words
                return [unreadable(batch[0].upload.name, first_line(error))]
            return [error]


def unreadable(name: str, why: str) -> ImageVerdict:
    """Return what is said of an image that has no score."""
    return ImageVerdict(name, None, None, None, None, why)
