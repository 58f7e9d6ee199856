"""Batching of the inputs of all pending requests."""

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException

from featnorm._utils.errors import first_line
from featnorm.inputs.decoding import decode
from featnorm.inputs.errors import ItemError
from featnorm.inputs.kinds import IMAGES, ROWS
from featnorm.serve.decoding import Decoders
from featnorm.serve.limits import MAX_PICTURED, RETRY, Limits
from featnorm.serve.responses import Why, why_of
from featnorm.serve.uploads import Upload
from featnorm.verdict import ItemVerdict, unreadable

if TYPE_CHECKING:
    from featnorm.serve.scorers import ServedScorer

log = logging.getLogger("featnorm.serve")

# Minimum number of pixels that an encoded byte counts as. A photograph has more pixels per byte; a file made to be
# slow to decode has fewer.
_MIN_PIXELS_PER_BYTE = 4
# Share of the timeout of a request that its pictures may take. The verdicts are known by then.
_PICTURES_SHARE = 0.5
# How many times smaller a batch for pictures is. A heat map takes about two more passes of the model, or up to
# sixteen if the model has no global average pooling.
_SMALLER = 8
# Why there is no heat map.
_BUSY = "the service is busy"
_TOO_MANY = f"only the {MAX_PICTURED} flagged images of a request with the lowest scores have one"
_FAILED = "an internal error: see the log of the service"

#: Verdicts on the inputs of a request, and explanations by the position of the input.
Scored = tuple[list[ItemVerdict], dict[int, Why]]


@dataclass(eq=False)
class Pending:
    """An image that waits for a scorer's model, and the future of its verdict.

    If it has an explanation ``why``, it waits for pictures, and the future is that of the explanation with them.
    """

    upload: Upload
    scorer: "ServedScorer"
    explain: bool
    group: str | None
    future: asyncio.Future[Any]
    prepared: Any = None
    why: Why | None = None


class Batcher:
    """Scores the images of any number of requests. All images that wait for a scorer are one batch.

    Images are decoded in two threads, and scored in a third, which all scorers share. They take turns after each
    batch, so that a scorer waits for at most one batch of each other scorer, and only one batch is in the memory
    of the device at a time. Explanations with pictures take longer, so they have smaller batches of their own,
    which take turns like those of another scorer. `run` must be running.

    Parameters
    ----------
    limits : Limits
        Limits on batches, and on the queue of all scorers together.
    on_batch : callable
        Called with the name of the scorer and the size of each batch.
    """

    def __init__(self, limits: Limits, on_batch: Callable[[str, int], None]) -> None:
        self._limits = limits
        self._on_batch = on_batch
        self._pending: set[Pending] = set()
        # By scorer and whether they wait for pictures; whose turn is next comes first. A scorer that was replaced
        # has the images of earlier requests.
        self._ready: dict[tuple[ServedScorer, bool], deque[Pending]] = {}
        self._any_ready = asyncio.Event()
        self._decoders = Decoders()
        self._model = ThreadPoolExecutor(1, "featnorm-model")

    @property
    def pending(self) -> Counter[str]:
        """Number of images, by name of the scorer, that were accepted but have not reached the model."""
        return Counter(image.scorer.name for image in self._pending)

    async def score(
        self, uploads: Sequence[Upload], scorer: "ServedScorer", *, explain: bool = False, group: str | None = None
    ) -> Scored:
        """Score the images of one request, in their order. If it is cancelled, pending images are dropped.

        With ``explain``, all images that are scored have an explanation, and the flagged ones with the lowest
        scores one with pictures.

        Raises
        ------
        HTTPException
            If too many images or pixels are pending, or the request alone has too many pixels.
        """
        limits = self._limits
        if len(self._pending) + len(uploads) > limits.queue:
            raise HTTPException(
                503, f"{len(self._pending)} inputs are already in the queue: try again later", RETRY
            )
        costs = [self._cost(upload) for upload in uploads]
        pixels = sum(costs)
        if pixels > limits.queue_pixels:
            raise HTTPException(
                413,
                f"the images count as {pixels:,} pixels, more than {limits.queue_pixels:,}: send them one by one",
            )
        if self._decoders.pixels + pixels > limits.queue_pixels:
            raise HTTPException(
                503, f"{self._decoders.pixels:,} pixels are already in the queue: try again later", RETRY
            )
        loop = asyncio.get_running_loop()
        images = [Pending(upload, scorer, explain, group, loop.create_future()) for upload in uploads]
        self._pending.update(images)
        # All are submitted at once, so that they count for the next request.
        tensors = [
            self._decoders.submit(partial(self._read, upload, scorer), cost, before)
            for upload, cost, before in zip(uploads, costs, accumulate(costs, initial=0), strict=False)
        ]
        try:
            verdicts = await asyncio.gather(*map(self._follow, images, tensors))
            return verdicts, await self._explained(images, verdicts) if explain else {}
        finally:
            self._pending.difference_update(images)
            for decoded, image in zip(tensors, images, strict=True):
                decoded.cancel()
                image.future.cancel()

    async def run(self) -> None:
        """Score pending images until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._any_ready.wait()
            batch = self._next_batch()
            if not batch:
                self._any_ready.clear()
                continue
            if batch[0].why is None:
                self._on_batch(batch[0].scorer.name, len(batch))
            results = await loop.run_in_executor(self._model, self._results, batch)
            for image, result in zip(batch, results, strict=True):
                if image.future.done():  # cancelled
                    continue
                if isinstance(result, Exception):
                    image.future.set_exception(result)
                else:
                    image.future.set_result(result)

    def close(self) -> None:
        """Stop the threads."""
        self._decoders.close()
        self._model.shutdown(wait=False, cancel_futures=True)

    async def _follow(self, image: Pending, decoded: asyncio.Future[Any]) -> ItemVerdict:
        tensor = await decoded
        if isinstance(tensor, str):
            self._pending.discard(image)
            return unreadable(image.upload.name, tensor)
        image.prepared = tensor
        self._enqueue(image)
        verdict: ItemVerdict = await image.future
        return verdict

    def _enqueue(self, image: Pending) -> None:
        self._ready.setdefault((image.scorer, image.why is not None), deque()).append(image)
        self._any_ready.set()

    async def _explained(self, images: Sequence[Pending], verdicts: Sequence[ItemVerdict]) -> dict[int, Why]:
        """Return the explanations of one request by position; those of the lowest flagged images have pictures."""
        kind = images[0].scorer.kind
        whys = {i: why_of(verdict.why, kind) for i, verdict in enumerate(verdicts) if verdict.why is not None}
        if kind is not IMAGES:
            return whys
        flagged = sorted((i for i in whys if verdicts[i].is_id is False), key=lambda i: verdicts[i].score or 0.0)
        for place, i in enumerate(flagged):
            whys[i].no_heat = _BUSY if place < MAX_PICTURED else _TOO_MANY
        lowest = flagged[:MAX_PICTURED]
        if not lowest or len(self._pending) + len(lowest) > self._limits.queue:
            return whys
        loop = asyncio.get_running_loop()
        waiting = {i: replace(images[i], why=whys[i], future=loop.create_future()) for i in lowest}
        self._pending.update(waiting.values())
        for image in waiting.values():
            self._enqueue(image)
        try:
            futures = [image.future for image in waiting.values()]
            await asyncio.wait(futures, timeout=_PICTURES_SHARE * self._limits.seconds)
        finally:
            self._pending.difference_update(waiting.values())
            drawn = {i: image.future for i, image in waiting.items() if not image.future.cancel()}
        return whys | {i: future.result() for i, future in drawn.items()}

    def _cost(self, upload: Upload) -> int:
        """Return the number of pixels that an image counts as in the queue."""
        # An image with too many pixels is rejected by its header, and not decoded.
        pixels, decoding, opening = upload.cost
        cost = opening + (decoding if pixels <= self._limits.pixels else 0)
        size = upload.size or len(upload.data)
        return min(max(cost, _MIN_PIXELS_PER_BYTE * size), self._limits.queue_pixels)

    def _read(self, upload: Upload, scorer: "ServedScorer") -> Any:
        """Return the transformed item, or why it cannot be scored."""
        if upload.error is not None:
            return upload.error
        kind = scorer.kind
        try:
            if kind is IMAGES:
                item: Any = decode(upload.data, upload.name, max_pixels=self._limits.pixels)
            else:
                raw = upload.data if kind is ROWS else upload.data.decode("utf-8", "surrogatepass")
                item = kind.item_of(raw, upload.name)
        except ItemError as error:
            return error.reason
        try:
            return scorer.transform(item)
        except ItemError as error:
            return error.reason
        except Exception:
            log.exception(
                "the transform failed on %s of size %s", kind.one, getattr(item, "size", len(upload.data))
            )
            return f"the transform failed on this {kind.noun}"

    def _next_batch(self) -> list[Pending]:
        """Return images of the scorer whose turn it is; none if none is ready."""
        batch: list[Pending] = []
        while self._ready and not batch:
            turn, images = next(iter(self._ready.items()))
            del self._ready[turn]
            size = self._limits.batch_size
            if turn[1]:
                size = max(1, size // _SMALLER)
            while images and len(batch) < size:
                image = images.popleft()
                if not image.future.done():
                    self._pending.discard(image)
                    batch.append(image)
            if images:
                self._ready[turn] = images
        return batch

    def _results(self, batch: Sequence[Pending]) -> Sequence[ItemVerdict | Why | Exception]:
        """Score or explain a batch; if that fails, its images one by one, so that only those at fault fail."""
        scorer, why = batch[0].scorer, batch[0].why
        try:
            return scorer.predict(batch) if why is None else scorer.explain(batch)
        except Exception as error:
            if len(batch) > 1:
                return [result for image in batch for result in self._results([image])]
            if why is not None:
                log.exception("an explanation failed")
                return [why.model_copy(update={"no_heat": _FAILED})]
            if isinstance(error, ValueError):  # an input that the detector rejects
                return [unreadable(batch[0].upload.name, first_line(error))]
            return [error]
