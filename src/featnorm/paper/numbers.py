"""The paper's own numbers, to stand beside ours."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def numbers(benchmark: str) -> dict[str, Any]:
    """Return the paper's tables of a benchmark, by name.

    A table has ``where``, its place in the paper (Park et al., ICCV 2023), and ``rows``: AUROC and FPR95 in
    percent, by detector and OOD set; those of "imagenet" by network first.

    Parameters
    ----------
    benchmark : "cifar10", "imagenet" or "one-class".
    """
    tables: dict[str, Any] = json.loads(files("featnorm.paper").joinpath("numbers.json").read_text("utf-8"))
    return tables[benchmark]
