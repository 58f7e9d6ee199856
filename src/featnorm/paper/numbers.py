"""The paper's own numbers, to stand beside ours."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def numbers(benchmark: str) -> dict[str, Any]:
    """Return the paper's tables of a benchmark: AUROC and FPR95 in percent, by detector and OOD set.

    Each holds ``where`` it stands in the paper and its ``rows``, those of "imagenet" by network; the paper is Park
    et al., ICCV 2023.

    Parameters
    ----------
    benchmark : "cifar10" or "imagenet".
    """
    tables: dict[str, Any] = json.loads(files("featnorm.paper").joinpath("numbers.json").read_text("utf-8"))
    return tables[benchmark]
