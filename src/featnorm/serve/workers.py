"""The threads and tasks of a service in one event loop: `Workers`."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

from PIL import Image

from featnorm.serve.batching import Batcher
from featnorm.serve.uploads import Upload

log = logging.getLogger("featnorm.serve")


class Workers:
    """Runs a batcher until `stop` or the end of the event loop.

    Parameters
    ----------
    batcher : Batcher
        A batcher that is not running yet.

    Attributes
    ----------
    parser : Executor
        Single thread for parsing bodies.
    ready : bool
        Whether a first image has been scored.
    stopped : bool
        Whether `stop` was called.
    """

    def __init__(self, batcher: Batcher) -> None:
        self.batcher = batcher
        self.parser = ThreadPoolExecutor(1, "featnorm-parse")
        self.ready = False
        self.stopped = False
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._warm_up())]

    def stop(self) -> None:
        """Drop pending images, and stop the threads."""
        self.ready = False
        self.stopped = True
        for task in self._tasks:
            task.cancel()

    async def _run(self) -> None:
        try:
            await self.batcher.run()
        finally:
            self.batcher.close()
            self.parser.shutdown(wait=False)

    async def _warm_up(self) -> None:
        picture = BytesIO()
        Image.new("RGB", (256, 256), "gray").save(picture, "PNG")
        try:
            await self.batcher.score([Upload("warm-up", picture.getvalue())])
        except Exception:
            log.exception("the first image failed: the service will not be ready")
        else:
            self.ready = not self.stopped
