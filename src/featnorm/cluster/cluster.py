"""`Cluster`: scores items, extracts features and fits detectors on the actors of a Ray cluster."""

import copy
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Self

import numpy as np
from torch import Tensor, nn

from featnorm._utils.extras import import_extra
from featnorm._utils.memory import keep_freed_memory
from featnorm.cluster.bank import BankPart, ShardedKNN
from featnorm.cluster.tasks import Extraction, Scoring, Task
from featnorm.detectors import KNN, Detector
from featnorm.fitting import training_features
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.inputs import DataError, Extracted, SlicedSource, Source
from featnorm.inputs.loading import rows_of
from featnorm.models import LoadedModel
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.verdict import ItemVerdict

#: Batches per shard: the maximum number to repeat when an actor dies.
_SHARD = 16
#: Times that a shard is repeated. One that ends its actor every time, for want of memory say, would never end.
_RETRIES = 3
#: Calls per actor that run, are done but not yet read, or wait.
_CALLS = 2
#: Share of Ray's memory that all actors' copies of a bank of KNN may take.
_BANK_SHARE = 0.5


@dataclass(frozen=True)
class Actors:
    """Maximum number of actors, and the resources of each.

    Parameters
    ----------
    count : maximum number of actors.
    device : "cpu" or "cuda".
    cpus, gpus : number of CPUs and GPUs per actor; with a GPU, the CPUs decode items.
    """

    count: int
    device: str
    cpus: int
    gpus: int

    @property
    def workers(self) -> int:
        """Number of threads that decode items; 0 for the actor's own."""
        return self.cpus if self.gpus else 0


class Cluster:
    """A Ray cluster: the one at ``RAY_ADDRESS``, or one started here with all CPUs of this machine.

    There is one actor per GPU, with an equal share of the CPUs to decode items, or else one per CPU, which
    decodes its items itself. If an actor dies, a new one repeats the shard that it was working on, at most 3
    times.

    Actors are started for the first task and kept, with their CPUs and GPUs, for later ones, until `close` is
    called or the ``with`` block ends.

    Parameters
    ----------
    device : "cpu", "cuda" or "gpu", or "auto" for GPUs if the cluster has any.

    Raises
    ------
    ImportError
        Ray is not installed.
    ValueError
        The cluster has no such device.
    """

    def __init__(self, device: str = "auto") -> None:
        ray = import_extra("ray")
        if not ray.is_initialized():
            ray.init(logging_level=logging.ERROR, log_to_driver=False)
        self.actors = _actors(device, _resources())
        self._ready: list[Any] = []
        # Keyed by a reference that is ready once the actor is: it may have to wait for CPUs held by others.
        self._starting: dict[Any, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors and whatever they are doing. The next task starts new ones."""
        import ray

        for actor in (*self._ready, *self._starting.values()):
            ray.kill(actor)
        self._ready.clear()
        self._starting.clear()

    def score(
        self,
        scorer: Scorer,
        source: Source[Any],
        batches: Sequence[int],
        *,
        runtime: Runtime,
    ) -> Iterator[tuple[int, list[ItemVerdict]]]:
        """Score batches of a source's items.

        A bank of KNN that is too large for a copy in every actor is split, one part per actor.

        Parameters
        ----------
        scorer : scorer with a preprocess, which is not changed.
        source : items, which every machine of the cluster must be able to read.
        batches : numbers of the batches to score.
        runtime : precision, batch size, and the engine, "torch" or "onnx".

        Yields
        ------
        Number and verdicts of a batch, in any order.

        Raises
        ------
        DataError
            The transform fails on an item, or some items end every process that reads them.
        ValueError
            An output of the model is not finite.
        """
        task = Scoring(self._in_parts(scorer), replace(runtime, cluster=None))
        return self._over_batches(task, source, batches, ordered=False)

    def extract(
        self, loaded: LoadedModel, backbone: nn.Module, *, runtime: Runtime
    ) -> Callable[[Source[Any]], Iterator[Extracted]]:
        """Return a function that extracts the features of items, for `featnorm.inputs.FeatureCache`.

        Parameters
        ----------
        loaded : model whose transform is applied.
        backbone : module from transformed items to features (n, D).
        runtime : see `score`.
        """
        task = Extraction(
            copy.deepcopy(backbone).cpu(), loaded.kind, loaded.transform, replace(runtime, cluster=None)
        )

        def extract(source: Source[Any]) -> Iterator[Extracted]:
            size = runtime.batch_of(source.kind)
            batches = range(-(-len(source) // size))
            # In order, so that the features are stored in the order of the items.
            for number, part in self._over_batches(task, source, batches, ordered=True):
                yield part.moved(number * size)

        return extract

    def _over_batches(
        self, task: Task, source: Source[Any], batches: Sequence[int], *, ordered: bool
    ) -> Iterator[tuple[int, Any]]:
        """Run a task on batches of a source's items; yield number and result of each.

        Parameters
        ----------
        task : task to run.
        source, batches : see `score`.
        ordered : whether to yield results in the order of ``batches``; a slow one then delays the others.
        """
        import ray

        if not batches:
            return
        shards = (batches[i : i + _SHARD] for i in range(0, len(batches), _SHARD))

        # Kept in a variable, because every actor that is started reads them.
        references = [ray.put(task), ray.put(source)]
        try:
            for results, error in self._results("run", ((references, shard) for shard in shards), ordered):
                yield from results
                if error is not None:
                    raise error
        except _ActorDiedError as died:
            size, (_, shard) = task.runtime.batch_of(source.kind), died.call
            first, last = rows_of(shard[0], size, len(source))[0], rows_of(shard[-1], size, len(source))[-1]
            raise DataError(
                f"the process that read {source.name(first)} to {source.name(last)} of {source.title} ended "
                f"{_RETRIES + 1} times, perhaps for want of memory: lower --batch-size, or leave these "
                f"{source.kind.name} out"
            ) from died.__cause__

    def _results(self, method: str, calls: Iterable[tuple[Any, ...]], ordered: bool) -> Iterator[Any]:
        """Call a method of the actors, each of which runs one call at a time; yield the results.

        Parameters
        ----------
        method : name of a method of `_Actor`.
        calls : arguments of each call, read as actors become free.
        ordered : see `_over_batches`.

        Raises
        ------
        _ActorDiedError
            A call ended its actor each time that it was made.
        """
        import ray

        max_actors = self.actors.count
        calls, waiting = iter(calls), deque[_Call]()
        busy: dict[Any, tuple[Any, _Call]] = {}
        unread: list[_Call] = []
        while True:
            free = _CALLS * max_actors - len(unread) - len(waiting)
            waiting.extend(map(_Call, islice(calls, max(0, free))))
            running = {actor for actor, _ in busy.values()}
            idle = [actor for actor in self._ready if actor not in running]
            while waiting and idle:
                actor, call = idle.pop(), waiting.popleft()
                busy[getattr(actor, method).remote(*call.arguments)] = actor, call
                if not call.deaths:
                    unread.append(call)
            while len(self._starting) < min(len(waiting), max_actors - len(self._ready)):
                actor = self._start_actor()
                self._starting[actor.__ray_ready__.remote()] = actor
            if not unread and not waiting:
                return
            for found in ray.wait([*busy, *self._starting])[0]:
                if found not in busy:
                    ray.get(found)
                    self._ready.append(self._starting.pop(found))
                    continue
                actor, call = busy.pop(found)
                try:
                    call.result, call.done = ray.get(found), True
                except ray.exceptions.RayActorError as error:
                    self._ready.remove(actor)
                    ray.kill(actor)  # it may only be out of reach
                    call.deaths += 1
                    if call.deaths > _RETRIES:
                        raise _ActorDiedError(call.arguments) from error
                    waiting.appendleft(call)
            if ordered:
                first = next((i for i, call in enumerate(unread) if not call.done), len(unread))
                done, unread = unread[:first], unread[first:]
            else:
                done, unread = [call for call in unread if call.done], [call for call in unread if not call.done]
            for call in done:
                yield call.result

    def _start_actor(self) -> Any:
        import ray

        actors = self.actors
        kind = ray.remote(num_cpus=actors.cpus, num_gpus=actors.gpus)(_Actor)
        return kind.remote(actors.device, actors.workers)

    def fit(
        self,
        parts: Iterable[tuple[Tensor, Tensor | None]],
        features_of: nn.Module,
        detector: Detector,
        statistics: ActivationStatistics,
    ) -> None:
        """Fit a detector to features of items, part by part, and merge the fits.

        Parameters
        ----------
        parts : cached values (n, D) and labels (n,), or None where there are none.
        features_of : module that makes `Features` of the values.
        detector : detector to fit in place; an earlier fit is dropped.
        statistics : activation statistics to update with all parts.
        """
        import ray

        # Sent after the reset, without an earlier fit.
        with detector.refit():
            reference = ray.put((copy.deepcopy(features_of).cpu(), copy.deepcopy(detector).cpu()))
            for fitted, found in self._results("fit", ((reference, *part) for part in parts), ordered=True):
                detector.merge(fitted)
                statistics.merge(found)

    def _in_parts(self, scorer: Scorer) -> Scorer:
        """Return a scorer whose large banks of KNN are split over processes."""
        import ray

        options: dict[str, Any] = {"max_restarts": _RETRIES, "max_task_retries": -1}
        part = ray.remote(num_cpus=0, scheduling_strategy="SPREAD", **options)(BankPart)
        memo: dict[int, Any] = {}
        for knn in scorer.detector.modules():
            if isinstance(knn, KNN) and self._is_large(knn):
                rows = np.array_split(knn.bank.rows.cpu().numpy(), self.actors.count)
                settings = repr(KNN(knn.k, knn.squared, knn.recall, knn.normalize))  # a part keeps all of its rows
                memo[id(knn)] = ShardedKNN(knn, [part.remote(some, settings) for some in rows])
        return copy.deepcopy(scorer, memo) if memo else scorer

    def _is_large(self, knn: KNN) -> bool:
        rows, width = knn.bank_shape
        return 4 * rows * width * self.actors.count > _BANK_SHARE * _resources().get("memory", np.inf)


@dataclass
class _Call:
    """A call of a method of an actor: its arguments, its result, and how many actors have died of it."""

    arguments: tuple[Any, ...]
    result: Any = None
    done: bool = False
    deaths: int = 0


class _ActorDiedError(RuntimeError):
    """A call ended its actor each time that it was made; the cause is Ray's error.

    Parameters
    ----------
    call : arguments of the call.
    """

    def __init__(self, call: tuple[Any, ...]) -> None:
        super().__init__("a worker process of the cluster ended each time that it was restarted")
        self.call = call


class _Actor:
    """Runs tasks. An error is returned as a result, because Ray would replace its message."""

    def __init__(self, device: str, workers: int) -> None:
        keep_freed_memory()
        self._device, self._workers = device, workers
        self._started: tuple[Task, Source[Any], Callable[[Source[Any]], Iterator[Any]]] | None = None
        self._names: list[str] = []

    def run(self, references: list[Any], numbers: Sequence[int]) -> tuple[list[tuple[int, Any]], Exception | None]:
        """Return number and result of each batch, up to the one that failed, and the error."""
        results: list[tuple[int, Any]] = []
        try:
            task, source, process = self._start(references)
            size = task.runtime.batch_of(source.kind)
            rows = [row for number in numbers for row in rows_of(number, size, len(source))]
            # Extended one by one, so that the results before an error are kept.
            results.extend(zip(numbers, process(SlicedSource(source, rows, source.title)), strict=True))
        except (ValueError, OSError) as error:
            return results, error
        return results, None

    def _start(self, references: list[Any]) -> tuple[Task, Source[Any], Callable[[Source[Any]], Iterator[Any]]]:
        """Return the task, the source, and the started task: once for all shards of the same."""
        import ray

        names = [reference.hex() for reference in references]
        if self._started is None or names != self._names:
            # The previous task's network is freed first.
            self._started = None
            task, source = ray.get(references)
            self._started = task, source, task.start(self._device, self._workers)
            self._names = names
        return self._started

    def fit(
        self, unfitted: tuple[nn.Module, Detector], values: Tensor, labels: Tensor | None
    ) -> tuple[Detector, ActivationStatistics]:
        """Return the fit to one part of the items."""
        features_of, detector = copy.deepcopy(unfitted)
        statistics = ActivationStatistics()
        for features in training_features(features_of, statistics, [(values, labels)]):
            detector.partial_fit(features)
        return detector, statistics


def _resources() -> dict[str, float]:
    import ray

    resources: dict[str, float] = ray.cluster_resources()
    return resources


def _actors(device: str, resources: dict[str, float]) -> Actors:
    cpus, gpus = int(resources.get("CPU", 1)), int(resources.get("GPU", 0))
    if device not in ("auto", "cpu", "cuda", "gpu"):
        raise ValueError(f"a cluster cannot use device {device!r}: choose auto, cpu or cuda")
    if device == "cpu" or (device == "auto" and not gpus):
        return Actors(max(1, cpus), "cpu", 1, 0)
    if not gpus:
        raise ValueError(f"cannot use device {device!r}: the cluster has no GPU")
    return Actors(gpus, "cuda", max(1, cpus // gpus), 1)
