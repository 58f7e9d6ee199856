"""`runtime_of`: where a command runs, by its options."""

import os
import shutil

from featnorm.runtime import Runtime

_COMPILERS = (os.environ.get("CXX", "g++"), "g++", "clang++")


def runtime_of(
    device: str,
    precision: str,
    batch_size: int | None = None,
    workers: int | None = None,
    *,
    ray: bool = False,
    compiled: bool = False,
    engine: str = "torch",
) -> Runtime:
    """Return the runtime that a command's options describe; its device has been tried.

    Raises
    ------
    ValueError
        The device, the precision or a compiler is not available here.
    ImportError
        Lightning Fabric or Ray is needed and not installed.
    """
    if compiled and not any(map(shutil.which, _COMPILERS)):
        raise ValueError(
            "--compile needs a C++ compiler, and neither g++ nor clang++ was found: install one, or omit --compile"
        )
    cluster = None
    if ray:
        from featnorm.cluster import Cluster

        cluster = Cluster(device)
    runtime = Runtime(device, precision, batch_size, workers, cluster=cluster, compiled=compiled, engine=engine)
    if cluster is None:
        _ = runtime.torch_device
    return runtime
