"""`Runtime`: where and how a model runs."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import torch

from featnorm._utils.extras import import_extra

_CPU = torch.device("cpu")
# The weights stay as they are under these; Lightning Fabric would convert them under its others.
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
ENGINES = ("auto", "torch", "onnx")


@dataclass(frozen=True)
class Runtime:
    """Device, precision, batches and workers of a run.

    Lightning Fabric, which takes a second to import, is imported only for mixed precision, for devices other than
    the CPU and CUDA, and for training that is not plain training on the CPU. A runtime can be pickled. As a
    context manager it closes its cluster.

    Parameters
    ----------
    device : device of the model: "cpu", "cuda", "mps", or "auto" for the accelerator of this machine, if any.
    precision : "32-true", "bf16-mixed" or "16-mixed", in Lightning Fabric's notation.
    batch_size
        Number of items that are read, run and written together. Default: 64 images or texts, 1024 rows. With the
        default, on a CPU and for 1000 images or more, PyTorch runs the images of a batch 8 at a time if that takes
        less time on the first batches.
    workers : number of threads that decode images; see `featnorm.inputs.source_loader`.
    cluster : a `featnorm.cluster.Cluster` whose actors run the model. Default: this process runs it.
    compiled : whether to compile networks before training.
    engine
        What runs the model in `fit`, `score` and the service: "torch" for PyTorch; "onnx" for onnxruntime on a
        CPU, of which the results differ from PyTorch's by less than 1e-4 of the largest; or "auto" for onnxruntime
        where it is installed, there are 1000 items or more, and the model can be exported. Training, heat maps and
        detectors that run the model again always use PyTorch.
    progress : whether to show progress bars. Default: on a terminal; elsewhere a line every 30 seconds.
    processes
        Number of processes that train together, each on a device of its own; ``runtime.fabric.launch`` starts the
        others.

    Raises
    ------
    ValueError
        The precision or the engine is not one of the three. A device that is not available raises when it is first
        used.

    Examples
    --------
    >>> scorer = fit(torch.randn(200, 16), runtime=Runtime(device="cpu", progress=False))
    """

    device: str = "cpu"
    precision: str = "32-true"
    batch_size: int | None = None
    workers: int | None = None
    cluster: Any = None
    compiled: bool = False
    progress: bool | None = None
    processes: int = 1
    engine: str = "auto"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")

    @cached_property
    def fabric(self) -> Any:
        """The `lightning_fabric.Fabric` that sets up training.

        For one process on the CPU, in single precision and not compiled, it is a stand-in, which does not need
        Lightning Fabric.

        Raises
        ------
        ValueError
            The device is not available.
        ImportError
            Lightning Fabric is not installed.
        """
        if self._on_cpu and self.precision == "32-true" and self.processes == 1 and not self.compiled:
            return _PlainFabric()
        fabric: Any = import_extra("lightning_fabric").Fabric

        class Compiling(fabric):  # type: ignore[misc]
            def setup(self, module: Any, *optimizers: Any, **options: Any) -> Any:
                # Crops come in two sizes: code for each is faster than code for any.
                compiled_module: Any = torch.compile(module, dynamic=False)
                return super().setup(compiled_module, *optimizers, **options)

        kind = Compiling if self.compiled else fabric
        try:
            return kind(
                accelerator=self.device,
                devices=self.processes,
                precision=self.precision,
            )
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"cannot use device {self.device!r} in {self.precision}: {error}") from None

    @cached_property
    def torch_device(self) -> torch.device:
        """The device of the model; a ValueError where it is not available."""
        if self._on_cpu:
            return _CPU
        if self.device in ("auto", "cuda", "gpu") and torch.cuda.is_available():
            return torch.device("cuda", 0)
        device: torch.device = self.fabric.device
        return device

    @property
    def _on_cpu(self) -> bool:
        return self.device == "cpu" or (self.device == "auto" and not torch.accelerator.is_available())

    def batch_of(self, kind: Any) -> int:
        """Return the number of items per batch, by the `featnorm.inputs.Kind` of the items."""
        size: int = kind.batch_size if self.batch_size is None else self.batch_size
        return size

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context in which the model runs in the precision."""
        if self.precision == "32-true":
            return nullcontext()
        context: AbstractContextManager[Any] = self.fabric.autocast()
        return context

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.cluster is not None:
            self.cluster.close()

    def __getstate__(self) -> dict[str, Any]:
        # What was made on this machine is made again on the other.
        return {field.name: getattr(self, field.name) for field in fields(self)}


class _PlainFabric:
    """What training calls of a Fabric, for one process on the CPU in single precision."""

    device = _CPU
    world_size = 1
    global_rank = 0

    def setup(self, module: Any, optimizer: Any) -> tuple[Any, Any]:
        return self.setup_module(module), optimizer

    def setup_module(self, module: Any) -> Any:
        return module.to(_CPU)

    def setup_optimizers(self, optimizer: Any) -> Any:
        return optimizer

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def all_reduce(self, values: torch.Tensor, **_: Any) -> torch.Tensor:
        return values
