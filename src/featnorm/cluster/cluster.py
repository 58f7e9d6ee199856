"""`Cluster`: batches of images over the actors of a Ray cluster, and fits over its processes."""

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from featnorm._utils.memory import keep_freed_memory
from featnorm.cluster.bank import BankPart, ShardedKNN
from featnorm.cluster.work import Extracting, Judging, Work
from featnorm.detectors import KNN, Detector
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.inputs import Extracted, ImageSource, SlicedSource
from featnorm.inputs.loading import rows_of
from featnorm.models import LoadedModel, ProjectionHead

#: Batches per shard: what the death of a worker costs at most.
_SHARD = 16
#: Calls per actor that are under way, done but not yet taken, or about to begin.
_CALLS = 2
#: Of the memory that Ray grants all actors, what their copies of KNN's bank may take.
_BANK_SHARE = 0.5


@dataclass(frozen=True)
class Actors:
    """How many actors there may be, and what each has.

    Parameters
    ----------
    count : of the actors.
    device : "cpu" or "cuda".
    cpus, gpus : of each; on a GPU the processors read the images.
    """

    count: int
    device: str
    cpus: int
    gpus: int

    @property
    def workers(self) -> int:
        """Threads that read images beside the actor's own."""
        return self.cpus if self.gpus else 0


class Cluster:
    """A Ray cluster: the one that ``RAY_ADDRESS`` names, or one of this machine's processors, started here.

    On CPUs an actor has one processor and reads its images itself; on GPUs it has one and as many processors as
    there are for each. Actors that die are started anew, with the shard that they were at.

    The actors start with the first work and stay for the next, with the processors and GPUs that they hold, until
    `close` or the end of a ``with`` block.

    Parameters
    ----------
    device : "auto" takes GPUs where the cluster has any; "cpu", "cuda" or "gpu".

    Raises
    ------
    ImportError
        Ray is not installed.
    ValueError
        The cluster has no such device.
    """

    def __init__(self, device: str = "auto") -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError(f"many machines need Ray ({error}): pip install '.[ray]' in a checkout") from None
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        self.actors = _actors(device, _resources())
        self._ready: list[Any] = []
        # By what is there once the actor is: it may wait for processors for as long as others hold them.
        self._starting: dict[Any, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and with them what they are at; the next work starts others."""
        import ray

        for actor in (*self._ready, *self._starting.values()):
            ray.kill(actor)
        self._ready.clear()
        self._starting.clear()

    def score(
        self,
        scorer: ImageScorer,
        source: ImageSource,
        batches: Sequence[int],
        *,
        batch_size: int = 64,
        precision: str = "32-true",
    ) -> Iterator[tuple[int, list[ImageVerdict]]]:
        """Judge batches of a source's images.

        A bank of KNN that is too large to be copied into every actor lies in parts, one an actor.

        Parameters
        ----------
        scorer : what judges; it stays as it is.
        source : the images; every machine of the cluster must be able to read them.
        batches : which ones, by number, of batches of that size.
        batch_size : images a batch.
        precision : as Fabric names it.

        Yields
        ------
        Number and verdicts of a batch, in whatever order they come.

        Raises
        ------
        DataError
            The transform fails on an image.
        ValueError
            The model gives a value that is not finite.
        """
        work = Judging(self._in_parts(scorer), precision, batch_size)
        return self._over_batches(work, source, batches, batch_size, ordered=False)

    def extract(
        self, loaded: LoadedModel, backbone: nn.Module, *, batch_size: int = 64, precision: str = "32-true"
    ) -> Callable[[ImageSource], Iterator[Extracted]]:
        """Return what asks a frozen backbone about images, for `featnorm.inputs.FeatureCache`.

        Parameters
        ----------
        loaded : whose transform it is.
        backbone : from transformed images (n, 3, H, W) to features (n, D).
        batch_size, precision : see `score`.
        """
        work = Extracting(copy.deepcopy(backbone).cpu(), loaded.transform, precision, batch_size)

        def extract(images: ImageSource) -> Iterator[Extracted]:
            batches = range(-(-len(images) // batch_size))
            # In order, so that the features of images lie as these do.
            for number, part in self._over_batches(work, images, batches, batch_size, ordered=True):
                yield part.moved(number * batch_size)

        return extract

    def _over_batches(
        self, work: Work, source: ImageSource, batches: Sequence[int], batch_size: int, *, ordered: bool
    ) -> Iterator[tuple[int, Any]]:
        """Do some work on batches of a source's images; yield number and result of each.

        Parameters
        ----------
        work, source, batches, batch_size : see `score`.
        ordered : whether results come in the order of ``batches``; a slow one then holds up the others.
        """
        import ray

        if not batches:
            return
        shards = (batches[i : i + _SHARD] for i in range(0, len(batches), _SHARD))
        # Held here, as actors that are started anew read them again.
        kept = [ray.put(work), ray.put(source)]
        for results, error in self._answers("work", ((kept, batch_size, shard) for shard in shards), ordered):
            yield from results
            if error is not None:
                raise error

    def _answers(self, method: str, calls: Iterable[tuple[Any, ...]], ordered: bool) -> Iterator[Any]:
        """Call a method of the actors, each of which answers one call at a time; yield what it returns.

        Parameters
        ----------
        method : of `_Actor`.
        calls : the arguments of each call, taken as actors become free.
        ordered : see `_over_batches`.
        """
        import ray

        most = self.actors.count
        calls, waiting = iter(calls), deque[tuple[Any, ...]]()
        busy: dict[Any, Any] = {}
        unread: list[Any] = []
        while True:
            waiting.extend(islice(calls, _CALLS * most - len(unread) - len(waiting)))
            at_work = set(busy.values())
            idle = [actor for actor in self._ready if actor not in at_work]
            while waiting and idle:
                actor = idle.pop()
                answer = getattr(actor, method).remote(*waiting.popleft())
                busy[answer] = actor
                unread.append(answer)
            while len(self._starting) < min(len(waiting), most - len(self._ready)):
                actor = self._actor()
                self._starting[actor.__ray_ready__.remote()] = actor
            if not unread and not waiting:
                return
            for found in ray.wait([*busy, *self._starting])[0]:
                if found in busy:
                    del busy[found]
                else:
                    ray.get(found)
                    self._ready.append(self._starting.pop(found))
            if ordered:
                held = next((i for i, answer in enumerate(unread) if answer in busy), len(unread))
                there, unread = unread[:held], unread[held:]
            else:
                there, unread = [answer for answer in unread if answer not in busy], list(busy)
            for answer in there:
                yield ray.get(answer)

    def _actor(self) -> Any:
        import ray

        actors = self.actors
        kind = ray.remote(num_cpus=actors.cpus, num_gpus=actors.gpus, max_restarts=-1, max_task_retries=-1)(_Actor)
        return kind.remote(actors.device, actors.workers)

    def fit(
        self, parts: Iterable[tuple[Tensor, Tensor | None]], head: ProjectionHead, detector: Detector
    ) -> ActivationStatistics:
        """Fit a detector to features of images, part by part, and merge what each part taught.

        Parameters
        ----------
        parts : backbone features (n, D) and labels (n,), or None for none.
        head : the network behind the backbone.
        detector : is fitted in place; what it had learned is forgotten.

        Returns
        -------
        The activation statistics of all parts.
        """
        import ray

        # As it is before it learns: what it knows need not travel.
        with detector.refit():
            kept = ray.put((copy.deepcopy(head).cpu(), copy.deepcopy(detector).cpu()))
            statistics = ActivationStatistics()
            for learned, seen in self._answers("fit", ((kept, *part) for part in parts), ordered=True):
                detector.merge(learned)
                statistics.merge(seen)
        return statistics

    def _in_parts(self, scorer: ImageScorer) -> ImageScorer:
        """Return a scorer whose banks of KNN, where they are large, lie in parts."""
        import ray

        part = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(BankPart)
        memo: dict[int, Any] = {}
        for knn in scorer.scorer.detector.modules():
            if isinstance(knn, KNN) and self._is_large(knn):
                rows = np.array_split(knn.bank.rows.cpu().numpy(), self.actors.count)
                memo[id(knn)] = ShardedKNN(knn, [part.remote(some, knn.k, knn.recall) for some in rows])
        return copy.deepcopy(scorer, memo) if memo else scorer

    def _is_large(self, knn: KNN) -> bool:
        rows, width = knn.bank_shape
        return 4 * rows * width * self.actors.count > _BANK_SHARE * _resources().get("memory", np.inf)


class _Actor:
    """What does the work. An error is a result too: as Ray's it would come back without its own message."""

    def __init__(self, device: str, workers: int) -> None:
        keep_freed_memory()
        self._device, self._workers = torch.device(device), workers
        self._begun: tuple[ImageSource, Callable[[ImageSource], Iterator[Any]]] | None = None
        self._kept: list[str] = []

    def work(
        self, kept: list[Any], batch_size: int, numbers: Sequence[int]
    ) -> tuple[list[tuple[int, Any]], Exception | None]:
        """Return number and result of each batch, up to the one that failed, and why it did."""
        source, ask = self._start(kept)
        rows = [row for number in numbers for row in rows_of(number, batch_size, len(source))]
        results: list[tuple[int, Any]] = []
        try:
            # One by one, so that those before an error stay.
            results.extend(zip(numbers, ask(SlicedSource(source, rows, source.title)), strict=True))
        except (ValueError, OSError) as error:
            return results, error
        return results, None

    def _start(self, kept: list[Any]) -> tuple[ImageSource, Callable[[ImageSource], Iterator[Any]]]:
        """Return the images, and what works on them: once for all shards of the same."""
        import ray

        names = [reference.hex() for reference in kept]
        if self._begun is None or names != self._kept:
            # The last work's network makes room for this one's.
            self._begun = None
            work, source = ray.get(kept)
            self._begun = source, work.start(self._device, self._workers)
            self._kept = names
        return self._begun

    def fit(
        self, kept: tuple[ProjectionHead, Detector], values: Tensor, labels: Tensor | None
    ) -> tuple[Detector, ActivationStatistics]:
        """Return what one part of the images taught."""
        from featnorm.fitting import learn

        head, detector = copy.deepcopy(kept)
        statistics = ActivationStatistics()
        learn(head, detector, statistics, values, labels)
        return detector, statistics


def _resources() -> dict[str, float]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources


def _actors(device: str, resources: dict[str, float]) -> Actors:
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"--device {device}: on a cluster it is auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not gpus):
        return Actors(max(1, cpus), "cpu", 1, 0)
    if not gpus:
        raise ValueError(f"--device {device}: the cluster has no GPU")
    return Actors(gpus, "cuda", max(1, cpus // gpus), 1)
