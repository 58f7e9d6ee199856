"""Where a command runs: on a device of this machine, or on a cluster."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

# Those under which the weights stay as they are; Fabric would convert them for the others.
_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
_COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


def cluster_of(device: str, ray: bool) -> AbstractContextManager[Any]:
    """Return the Ray cluster where it is asked for, else a context of None."""
    if not ray:
        return nullcontext()
    from featnorm.cluster import Cluster

    return Cluster(device)


def fabric_of(device: str, precision: str, *, compiled: bool = False) -> Any:
    """Return Fabric on one device; what it sets up for training is compiled where that is asked for.

    Raises
    ------
    ValueError
        There is no such device, precision or compiler here.
    ImportError
        Fabric is not installed.
    """
    if precision not in _PRECISIONS:
        raise ValueError(f"--precision is one of {', '.join(_PRECISIONS)}, got {precision}")
    if compiled and not any(map(shutil.which, _COMPILERS)):
        raise ValueError("--compile needs a C++ compiler, and there is no g++ or clang++ here: leave it out")
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise ImportError("models and devices need: pip install '.[vision]' in a checkout") from None

    class Compiling(Fabric):  # type: ignore[misc, valid-type, unused-ignore]
        def setup(self, module: Any, *optimizers: Any, **options: Any) -> Any:
            # Crops come in two sizes: code for each is faster than code for any.
            compiled_module: Any = torch.compile(module, dynamic=False)
            return super().setup(compiled_module, *optimizers, **options)

    kind = Compiling if compiled else Fabric
    try:
        return kind(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--device {device} --precision {precision}: {error}") from None
