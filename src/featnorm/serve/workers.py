"""The threads and tasks of a service in one event loop: `Workers`."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from typing import Any

from PIL import Image

from featnorm.serve.batching import Batcher
from featnorm.serve.scorers import ServedScorers
from featnorm.serve.uploads import Upload

log = logging.getLogger("featnorm.serve")

# Seconds between two looks at the files of the scorers.
_POLL = 1.0


def _uploaded(item: Any) -> Any:
    """Return an item as the data of an `Upload`."""
    if not isinstance(item, Image.Image):
        return item.encode() if isinstance(item, str) else item
    file = BytesIO()
    item.save(file, "PNG")
    return file.getvalue()


class Workers:
    """Runs a batcher and watches the files of scorers until `stop` or the end of the event loop.

    Parameters
    ----------
    batcher : Batcher
        A batcher that is not running yet.
    scorers : ServedScorers
        The scorers of the service.

    Attributes
    ----------
    parser : Executor
        Single thread for parsing bodies.
    ready : bool
        Whether every scorer has scored a first input.
    stopped : bool
        Whether `stop` was called.
    """

    def __init__(self, batcher: Batcher, scorers: ServedScorers) -> None:
        self.batcher = batcher
        self.parser = ThreadPoolExecutor(1, "featnorm-parse")
        self.ready = False
        self.stopped = False
        self._scorers = scorers
        self._loader = ThreadPoolExecutor(1, "featnorm-load")
        self._tasks = [asyncio.create_task(work()) for work in (self._run, self._warm_up, self._watch)]

    def stop(self) -> None:
        """Drop pending inputs, and stop the threads."""
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
            self._loader.shutdown(wait=False)

    async def _warm_up(self) -> None:
        loop = asyncio.get_running_loop()
        for scorer in self._scorers.values():
            try:
                upload = Upload("warm-up", _uploaded(scorer.kind.reference(scorer.transform)))
                await self.batcher.score([upload], scorer, group=scorer.any_group)
                await loop.run_in_executor(self._loader, scorer.warm_up_explanations)
            except Exception:
                log.exception("the first item of %r failed: the service will not be ready", scorer.name)
                return
        self.ready = not self.stopped

    async def _watch(self) -> None:
        while self._scorers.watched:
            await asyncio.sleep(_POLL)
            await asyncio.get_running_loop().run_in_executor(self._loader, self._scorers.reload)
