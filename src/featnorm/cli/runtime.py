"""Where a command runs: a device of this machine, or a cluster."""

import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


def cluster_of(device: str, ray: bool) -> AbstractContextManager[Any]:
    """Return the context of a Ray cluster if ``ray``, else of None."""
    if not ray:
        return nullcontext()
    from featnorm.cluster import Cluster

    return Cluster(device)


def fabric_of(device: str, precision: str, *, compiled: bool = False) -> Any:
    """Return Lightning Fabric on one device; if ``compiled``, it compiles the models that it sets up for training.

    Raises
    ------
    ValueError
        The device or the compiler is not available.
    ImportError
        Lightning Fabric is not installed.
    """
    if compiled and not any(map(shutil.which, _COMPILERS)):
        raise ValueError("--compile needs a C++ compiler, and there is no g++ or clang++ here: leave it out")
    try:
        from lightning_fabric import Fabric
    except ImportError:
        raise ImportError("models and devices need: pip install '.[vision]' in a checkout") from None

    class Compiling(Fabric):  # type: ignore[misc, valid-type, unused-ignore]
        def setup(self, module: Any, *optimizers: Any, **options: Any) -> Any:
            # Crops come in two sizes: code for one size is faster than code for any size.
            compiled_module: Any = torch.compile(module, dynamic=False)
            return super().setup(compiled_module, *optimizers, **options)

    kind = Compiling if compiled else Fabric
    try:
        return kind(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--device {device} --precision {precision}: {error}") from None
