"""Decoding of images in two threads, so that small ones do not wait for large ones: `Decoders`."""

import asyncio
import heapq
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

T = TypeVar("T")

_THREADS = 2
# Number of pixels above which an image is large. At most one large image is decoded at a time: the other thread is
# for small ones, and the largest image that is accepted needs 1.5 GB of memory while it is decoded.
_LARGE = 16_000_000
# Approximate number of pixels that a thread decodes per second. An image can be overtaken by those that arrive
# within the time that its own decoding takes.
_PIXELS_PER_SECOND = 10_000_000


@dataclass(eq=False)
class _Job:
    due: float
    number: int
    work: Callable[[], Any]
    pixels: int
    result: asyncio.Future[Any]

    def __lt__(self, other: "_Job") -> bool:
        return (self.due, self.number) < (other.due, other.number)

    @property
    def large(self) -> bool:
        return self.pixels > _LARGE


class Decoders:
    """Two threads that decode images in the order of their arrival, each delayed by the time that it takes itself.

    Attributes
    ----------
    pixels : int
        Number of pixels of all images that are waiting to be decoded, or being decoded.
    """

    def __init__(self) -> None:
        self.pixels = 0
        self._pool = ThreadPoolExecutor(_THREADS, "featnorm-decode")
        self._numbers = count()
        self._waiting: dict[bool, list[_Job]] = {False: [], True: []}  # heaps, by whether they are large
        self._running: list[_Job] = []

    def submit(self, work: Callable[[], T], pixels: int, before: int = 0) -> asyncio.Future[T]:
        """Schedule work that decodes an image, and return the future of its result.

        If the future is cancelled, work that has not begun is dropped.

        Parameters
        ----------
        work : callable
            Decodes the image.
        pixels : int
            Number of pixels that the image counts as.
        before : int
            Number of pixels of the images before it in its request. They delay it as well, because many images
            are as slow as a large one.
        """
        loop = asyncio.get_running_loop()
        due = loop.time() + (before + pixels) / _PIXELS_PER_SECOND
        job = _Job(due, next(self._numbers), work, pixels, loop.create_future())
        job.result.add_done_callback(lambda _: self._drop(job))
        heapq.heappush(self._waiting[job.large], job)
        self.pixels += pixels
        self._start()
        return job.result

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drop(self, job: _Job) -> None:
        waiting = self._waiting[job.large]
        if job in waiting:
            waiting.remove(job)
            heapq.heapify(waiting)
            self.pixels -= job.pixels

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while len(self._running) < _THREADS:
            sizes = (False,) if any(job.large for job in self._running) else (False, True)
            heaps = [self._waiting[large] for large in sizes if self._waiting[large]]
            if not heaps:
                return
            job = heapq.heappop(min(heaps, key=lambda heap: heap[0]))
            self._running.append(job)
            done = loop.run_in_executor(self._pool, job.work)
            done.add_done_callback(lambda done, job=job: self._finish(job, done))  # type: ignore[misc]

    def _finish(self, job: _Job, done: asyncio.Future[Any]) -> None:
        self._running.remove(job)
        self.pixels -= job.pixels
        if done.cancelled():
            job.result.cancel()
        elif not job.result.done():
            error = done.exception()
            if error is None:
                job.result.set_result(done.result())
            else:
                job.result.set_exception(error)
        if not done.cancelled():  # it is cancelled when the threads are stopped
            self._start()
