"""`Cluster`: batches of images over the actors of a Ray cluster, and fits over its processes."""

import copy
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor, nn

from featnorm._utils.memory import keep_freed_memory
from featnorm.cluster.bank import BankPart, ShardedKNN
from featnorm.cluster.work import Extracting, Scoring, Work
from featnorm.detectors import KNN, Detector
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.inputs import Extracted, ImageSource, SlicedImages
from featnorm.inputs.loading import rows_of
from featnorm.models import LoadedModel, ProjectionHead
from featnorm.runtime import Runtime

#: Batches a shard: what the death of a worker costs at most. More where there would be too many shards to plan.
_SHARD = 16
_MOST_SHARDS = 10_000
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
            import ray.data
        except ImportError as error:
            raise ImportError(f"many machines need Ray ({error}): pip install '.[ray]' in a checkout") from None
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        self.actors = _actors(device, _resources())
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)

    def score(
        self,
        scorer: ImageScorer,
        source: ImageSource,
        batches: Sequence[int],
        *,
        runtime: Runtime,
    ) -> Iterator[tuple[int, list[ImageVerdict]]]:
        """Judge batches of a source's images.

        A bank of KNN that is too large to be copied into every actor lies in parts, one an actor.

        Parameters
        ----------
        scorer : what judges; it stays as it is.
        source : the images; every machine of the cluster must be able to read them.
        batches : numbers of the batches to score.
        runtime : precision and batch size.

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
        work = Scoring(self._in_parts(scorer), replace(runtime, cluster=None))
        return self._over_batches(work, source, batches, ordered=False)

    def extract(
        self, loaded: LoadedModel, backbone: nn.Module, *, runtime: Runtime
    ) -> Callable[[ImageSource], Iterator[Extracted]]:
        """Return what asks a frozen backbone about images, for `featnorm.inputs.FeatureCache`.

        Parameters
        ----------
        loaded : whose transform it is.
        backbone : from transformed images (n, 3, H, W) to features (n, D).
        runtime : see `score`.
        """
        work = Extracting(copy.deepcopy(backbone).cpu(), loaded.transform, replace(runtime, cluster=None))
        batch_size = runtime.batch_size

        def extract(images: ImageSource) -> Iterator[Extracted]:
            batches = range(-(-len(images) // batch_size))
            # In order, so that the features of images lie as these do.
            for number, part in self._over_batches(work, images, batches, ordered=True):
                yield part.moved(number * batch_size)

        return extract

    def _over_batches(
        self, work: Work, source: ImageSource, batches: Sequence[int], *, ordered: bool
    ) -> Iterator[tuple[int, Any]]:
        """Do some work on batches of a source's images; yield number and result of each.

        Parameters
        ----------
        work : what to do with each batch.
        source, batches : see `score`.
        ordered : whether results come in the order of ``batches``; a slow one then holds up the others.
        """
        import ray
        from ray.data import ActorPoolStrategy, DataContext

        if not batches:
            return
        size = max(_SHARD, -(-len(batches) // _MOST_SHARDS))
        shards = [{"batches": json.dumps(list(batches[i : i + size]))} for i in range(0, len(batches), size)]
        count = min(self.actors.count, len(shards))
        # Held here, as actors that are started anew read them again.
        kept = [ray.put(work), ray.put(source)]
        DataContext.get_current().execution_options.preserve_order = ordered
        results = ray.data.from_items(shards, override_num_blocks=len(shards)).map_batches(
            _Actor,
            fn_constructor_args=(kept, work.runtime.batch_size, self.actors),
            batch_size=None,
            compute=ActorPoolStrategy(min_size=1, max_size=count),
            num_cpus=self.actors.cpus,
            num_gpus=self.actors.gpus,
        )
        for row in results.iter_rows():
            if isinstance(row["result"], Exception):
                raise row["result"]
            yield int(row["number"]), row["result"]

    def fit(
        self,
        parts: Iterable[tuple[Tensor, Tensor | None]],
        head: ProjectionHead,
        detector: Detector,
        statistics: ActivationStatistics,
    ) -> None:
        """Fit a detector to features of images, part by part, and merge the fits.

        Parameters
        ----------
        parts : backbone features (n, D) and labels (n,), or None for none.
        head : the network behind the backbone.
        detector : detector to fit in place; an earlier fit is dropped.
        statistics : activation statistics to update with all parts.
        """
        import ray

        # No more run at once than there may be actors. They claim no processor: actors that are on their way out,
        # or came too late, still hold theirs for a while.
        fit_part = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(_fit_part)
        # As it is before it learns: what it knows need not travel.
        with detector.refit():
            kept = ray.put((copy.deepcopy(head).cpu(), copy.deepcopy(detector).cpu()))
            running: list[Any] = []
            for values, labels in parts:
                if len(running) == self.actors.count:
                    _merge(ray.get(running.pop(0)), detector, statistics)
                running.append(fit_part.remote(kept, values, labels))
            for result in running:
                _merge(ray.get(result), detector, statistics)

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
    """What does the work; a result is data, and so is an error, which would come back without its own message."""

    def __init__(self, kept: list[Any], batch_size: int, actors: Actors) -> None:
        self.kept, self.batch_size, self.actors = kept, batch_size, actors

    @cached_property
    def _begun(self) -> tuple[ImageSource, Callable[[ImageSource], Iterator[Any]]]:
        # Not when it is made: an actor that came too late to do anything would wait for ever for what is not kept
        # any more, and hold its processor.
        import ray

        keep_freed_memory()
        work, source = ray.get(self.kept)
        return source, work.start(self.actors.device, self.actors.workers)

    def __call__(self, shards: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        source, ask = self._begun
        numbers = [number for shard in shards["batches"] for number in json.loads(shard)]
        rows = [row for number in numbers for row in rows_of(number, self.batch_size, len(source))]
        images = SlicedImages(source, rows, source.title)
        try:
            for number, result in zip(numbers, ask(images), strict=True):
                yield _row(number, result)
        except (ValueError, OSError) as error:
            yield _row(-1, error)


def _row(number: int, result: Any) -> dict[str, np.ndarray]:
    column = np.empty(1, object)
    column[0] = result
    return {"number": np.array([number]), "result": column}


def _fit_part(
    kept: tuple[ProjectionHead, Detector], values: Tensor, labels: Tensor | None
) -> tuple[Detector, ActivationStatistics]:
    from featnorm.fitting import training_features

    head, detector = copy.deepcopy(kept)
    statistics = ActivationStatistics()
    for features in training_features(head, statistics, [(values, labels)]):
        detector.partial_fit(features)
    return detector, statistics


def _merge(
    found: tuple[Detector, ActivationStatistics], detector: Detector, statistics: ActivationStatistics
) -> None:
    detector.merge(found[0])
    statistics.merge(found[1])


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
